"""Names and stacks in which an HF folder stores its tensors, if they differ from the families' tables.

The tables contain each expert's matrices, all with the prefix ``model.``. transformers may also save the experts of a
layer as two stacked tensors (``gate_up_proj``, with gate and then up of each expert, and ``down_proj``), a base model
without the prefix ``model.``, and tied embeddings under either name. The tables of GPT-OSS contain each expert's part
of its stacks, whose names they share but for the expert's number. Each tensor of the tables is a contiguous range of
bytes in a stored tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megaprune.models.names import BASE_PREFIX, is_of_base_model
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.weights.fp8 import SCALE_SUFFIX

_STACK = re.compile(rf"^(model\..+\.mlp\.experts)\.(gate_up_proj|down_proj)({SCALE_SUFFIX})?$")
_EXPERT = re.compile(rf"^(model\..+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight({SCALE_SUFFIX})?$")
# The same where the tables name each expert's part of a stack.
_OF_WHOLE = r"(gate_up_proj|down_proj)(_bias)?(_blocks|_scales)?"
_WHOLE_STACK = re.compile(rf"^(model\..+\.mlp\.experts)\.{_OF_WHOLE}$")
_WHOLE_EXPERT = re.compile(rf"^(model\..+\.mlp\.experts)\.(\d+)\.{_OF_WHOLE}$")
_HALVES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


@dataclass(frozen=True)
class Place:
    """Place of a tensor of the tables: a stored tensor, or one of its equal parts in order."""

    stored: str
    part: int = 0
    parts: int | None = None

    def span(self, num_bytes: int) -> tuple[int, int]:
        """Return the position of its first byte in the stored tensor, and its number of bytes."""
        if self.parts is None:
            return 0, num_bytes
        length = num_bytes // self.parts
        return self.part * length, length

    def at(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the expert, the first row within the expert, and the number of rows, in a stack of this shape."""
        of_expert = (self.parts or 1) // shape[0]
        expert, half = divmod(self.part, of_expert)
        rows = shape[1] // of_expert
        return expert, half * rows, rows


@dataclass(frozen=True)
class StoredLayout:
    """Differences from the tables.

    Args:
        bare: names have no prefix ``model.``.
        stacks: the stacked tensors, their names with ``model.``.
        embedding_as_output: the tied embedding is stored as ``lm_head.weight``.
        prefix: names of the language model have it in front; other names are those of other parts of the model.
        whole_experts: the tables name each expert's part of a stack, instead of its gate, up and down.
    """

    bare: bool = False
    stacks: frozenset[str] = frozenset()
    embedding_as_output: bool = False
    prefix: str = ""
    whole_experts: bool = False

    @classmethod
    def of(cls, names: Iterable[str], tied: bool, prefix: str = "", whole_experts: bool = False) -> "StoredLayout":
        """Return the layout in which these tensors are stored, given what the family says of its names."""
        names = {name.removeprefix(prefix) for name in names}
        bare = any(map(is_of_base_model, names)) and not any(name.startswith(BASE_PREFIX) for name in names)
        full = {_full_name(name) for name in names} if bare else names
        if whole_experts:
            found = {_WHOLE_STACK.match(name) for name in full}
            stacks = frozenset(f"{match[1]}.{match[2]}{match[3] or ''}" for match in found if match)
        else:
            stacks = frozenset(name for name in full if _STACK.match(name) and not name.endswith(SCALE_SUFFIX))
        return cls(bare, stacks, tied and OUTPUT in full and EMBEDDING not in full, prefix, whole_experts)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StoredLayout":
        """Return the layout that `record` describes."""
        stacks, prefix = frozenset(record["stacks"]), record.get("prefix", "")
        return cls(record["bare"], stacks, record["embedding_as_output"], prefix, record.get("whole_experts", False))

    def record(self) -> dict[str, Any]:
        """Return the layout as plain data for JSON."""
        record = {"bare": self.bare, "stacks": sorted(self.stacks), "embedding_as_output": self.embedding_as_output}
        record |= {"whole_experts": True} if self.whole_experts else {}
        return record | ({"prefix": self.prefix} if self.prefix else {})

    def renamed(self, rename: Callable[[str], str | None]) -> "StoredLayout":
        """Return the layout of a pruned model.

        Args:
            rename: returns a tensor's new name, or None if it is removed.
        """
        stacks = frozenset(new for new in map(rename, self.stacks) if new is not None)
        return replace(self, stacks=stacks)

    def name_of_missing(self, name: str) -> str:
        """Return the name that a missing tensor would have in this layout, for messages."""
        found = self._stack_and_suffix(name)
        return self._outer("".join(found)) if found and self.stacks else self.stored_name(name)

    def stack_of(self, name: str) -> str | None:
        """Return the name (with ``model.``) of the stack that contains a tensor of the tables."""
        found = self._stack_and_suffix(name) if self.stacks else None
        return "".join(found) if found and found[0] in self.stacks else None

    def parts_of_expert(self, stack: str) -> int:
        """Return the number of tensors of the tables that a stack contains of each expert."""
        return 2 if stack.endswith("gate_up_proj") and not self.whole_experts else 1

    def members(self, stack: str, expert: int) -> list[str]:
        """Return the tensors of the tables that a stack (with ``model.``) contains of an expert, in order."""
        experts, _, parameter = stack.rpartition(".")
        if self.whole_experts:
            return [f"{experts}.{expert}.{parameter}"]
        return [f"{experts}.{expert}.{half}_proj.weight" for half in _HALVES[parameter]]

    def _stack_and_suffix(self, name: str) -> tuple[str, str] | None:
        """Return the stack that may contain an expert's tensor, and the suffix of a companion's name."""
        if self.whole_experts:
            match = _WHOLE_EXPERT.match(name)
            return (f"{match[1]}.{match[3]}{match[4] or ''}", match[5] or "") if match else None
        match = _EXPERT.match(name)
        if not match:
            return None
        return f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}", match[4] or ""

    def stored_name(self, name: str) -> str:
        """Return the name of the stored tensor that contains a tensor of the tables."""
        return self._outer(self.stack_of(name) or name)

    def _outer(self, name: str) -> str:
        if self.embedding_as_output and name == EMBEDDING:
            name = OUTPUT
        elif self.bare:
            name = name.removeprefix(BASE_PREFIX)
        return self.prefix + name if self.prefix and _is_of_language_model(name) else name

    def written_name(self, name: str) -> str:
        """Return the name under which a tensor is written first: its own name if it will be stacked later."""
        return name if self.stack_of(name) else self.stored_name(name)

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return the stored tensors, each with the tensors of the tables that it consists of, in order."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.stored_name(name), []).append(name)
        return {stored: sorted(parts, key=_order) if len(parts) > 1 else parts for stored, parts in found.items()}

    def places(self, stored: str, num_experts: int) -> dict[str, Place]:
        """Return the tensors of the tables that a stored tensor consists of, each with its place.

        Args:
            num_experts: the number of experts in the tensor, if it is a stack.
        """
        name = stored.removeprefix(self.prefix)
        name = _full_name(name) if self.bare else name
        if self.embedding_as_output and name == OUTPUT:
            name = EMBEDDING
        if self.whole_experts:
            return self._whole_places(stored, name, num_experts)
        match = _STACK.match(name)
        if not match or f"{match[1]}.{match[2]}" not in self.stacks:
            return {name: Place(stored)}
        halves, suffix = _HALVES[match[2]], match[3] or ""
        return {
            f"{match[1]}.{expert}.{half}_proj.weight{suffix}": Place(
                stored, expert * len(halves) + number, num_experts * len(halves)
            )
            for expert in range(num_experts)
            for number, half in enumerate(halves)
        }

    @staticmethod
    def _whole_places(stored: str, name: str, num_experts: int) -> dict[str, Place]:
        if not _WHOLE_STACK.match(name):
            return {name: Place(stored)}
        experts, _, parameter = name.rpartition(".")
        return {f"{experts}.{expert}.{parameter}": Place(stored, expert, num_experts) for expert in range(num_experts)}


PLAIN = StoredLayout()


def _is_of_language_model(name: str) -> bool:
    return is_of_base_model(name.removeprefix(BASE_PREFIX)) or name == OUTPUT


def _full_name(name: str) -> str:
    return BASE_PREFIX + name if is_of_base_model(name) else name


def _order(name: str) -> tuple[int, str]:
    match = _EXPERT.match(name) or _WHOLE_EXPERT.match(name)
    assert match, name
    return int(match[2]), match[3]  # gate before up
