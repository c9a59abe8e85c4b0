"""Names and stacks in which an HF folder stores its tensors, if they differ from the families' tables.

The tables contain each expert's matrices, all with the prefix ``model.``. transformers may also save the experts of a
layer as two stacked tensors (``gate_up_proj``, with gate and then up of each expert, and ``down_proj``), a base model
without the prefix ``model.``, and tied embeddings under either name. Each tensor of the tables is a contiguous range of
bytes in a stored tensor.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaprune.models.names import BASE_PREFIX, is_of_base_model
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.weights.fp8 import SCALE_SUFFIX

_STACK = re.compile(rf"^(model\..+\.mlp\.experts)\.(gate_up_proj|down_proj)({SCALE_SUFFIX})?$")
_EXPERT = re.compile(rf"^(model\..+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight({SCALE_SUFFIX})?$")
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
    """

    bare: bool = False
    stacks: frozenset[str] = frozenset()
    embedding_as_output: bool = False
    prefix: str = ""

    @classmethod
    def of(cls, names: Iterable[str], tied: bool, prefix: str = "") -> "StoredLayout":
        """Return the layout in which these tensors are stored, given the prefix of the language model's names."""
        names = {name.removeprefix(prefix) for name in names}
        bare = any(map(is_of_base_model, names)) and not any(name.startswith(BASE_PREFIX) for name in names)
        full = {_full_name(name) for name in names} if bare else names
        stacks = frozenset(name for name in full if _STACK.match(name) and not name.endswith(SCALE_SUFFIX))
        return cls(bare, stacks, tied and OUTPUT in full and EMBEDDING not in full, prefix)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StoredLayout":
        """Return the layout that `record` describes."""
        stacks, prefix = frozenset(record["stacks"]), record.get("prefix", "")
        return cls(record["bare"], stacks, record["embedding_as_output"], prefix)

    def record(self) -> dict[str, Any]:
        """Return the layout as plain data for JSON."""
        record = {"bare": self.bare, "stacks": sorted(self.stacks), "embedding_as_output": self.embedding_as_output}
        return record | ({"prefix": self.prefix} if self.prefix else {})

    def renamed(self, rename: Callable[[str], str | None]) -> "StoredLayout":
        """Return the layout of a pruned model.

        Args:
            rename: returns a tensor's new name, or None if it is removed.
        """
        stacks = frozenset(new for new in map(rename, self.stacks) if new is not None)
        return StoredLayout(self.bare, stacks, self.embedding_as_output, self.prefix)

    def name_of_missing(self, name: str) -> str:
        """Return the name that a missing tensor would have in this layout, for messages."""
        match = _EXPERT.match(name)
        if not (match and self.stacks):
            return self.stored_name(name)
        return self._outer(f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}{match[4] or ''}")

    def stack_of(self, name: str) -> str | None:
        """Return the name (with ``model.``) of the stack that contains a tensor of the tables."""
        match = _EXPERT.match(name) if self.stacks else None
        if not match:
            return None
        stack = f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}"
        return stack + (match[4] or "") if stack in self.stacks else None

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


PLAIN = StoredLayout()


def _is_of_language_model(name: str) -> bool:
    return is_of_base_model(name.removeprefix(BASE_PREFIX)) or name == OUTPUT


def _full_name(name: str) -> str:
    return BASE_PREFIX + name if is_of_base_model(name) else name


def _order(name: str) -> tuple[int, str]:
    match = _EXPERT.match(name)
    assert match, name
    return int(match[2]), match[3]  # gate before up
