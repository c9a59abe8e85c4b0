"""The names and stacks in which an HF folder stores its tensors, where they differ from the families' tables.

The tables name each expert's matrices, all under ``model.``. transformers also saves the experts of a layer as two
stacked tensors (``gate_up_proj``, for each expert its gate, then its up; and ``down_proj``), a base model without the
prefix ``model.``, and of tied embeddings either name. Each tensor of the tables is a run of bytes in what is stored.
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
    """The place of a tensor of the tables: a stored tensor, whole, or one of its equal parts in order."""

    stored: str
    part: int = 0
    parts: int | None = None

    def span(self, num_bytes: int) -> tuple[int, int]:
        """The first of its bytes among the stored tensor's, and how many they are."""
        if self.parts is None:
            return 0, num_bytes
        length = num_bytes // self.parts
        return self.part * length, length

    def at(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Its expert, its first row within the expert, and its rows, in a stack of this shape."""
        of_expert = (self.parts or 1) // shape[0]
        expert, half = divmod(self.part, of_expert)
        rows = shape[1] // of_expert
        return expert, half * rows, rows


@dataclass(frozen=True)
class StoredLayout:
    """The differences from the tables.

    Args:
        bare: names lack ``model.``.
        stacks: the stacked tensors, their names with ``model.``.
        embedding_as_output: the tied embedding is stored as ``lm_head.weight``.
    """

    bare: bool = False
    stacks: frozenset[str] = frozenset()
    embedding_as_output: bool = False

    @classmethod
    def of(cls, names: Iterable[str], tied: bool) -> "StoredLayout":
        """The layout in which these tensors are stored."""
        names = set(names)
        bare = any(map(is_of_base_model, names)) and not any(name.startswith(BASE_PREFIX) for name in names)
        full = {_full_name(name) for name in names} if bare else names
        stacks = frozenset(name for name in full if _STACK.match(name) and not name.endswith(SCALE_SUFFIX))
        return cls(bare, stacks, tied and OUTPUT in full and EMBEDDING not in full)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "StoredLayout":
        """The layout that `record` gave."""
        return cls(record["bare"], frozenset(record["stacks"]), record["embedding_as_output"])

    def record(self) -> dict[str, Any]:
        """The layout for JSON."""
        return {"bare": self.bare, "stacks": sorted(self.stacks), "embedding_as_output": self.embedding_as_output}

    def renamed(self, rename: Callable[[str], str | None]) -> "StoredLayout":
        """The layout of a pruned model.

        Args:
            rename: gives a tensor's new name, or None where it is gone.
        """
        stacks = frozenset(new for new in map(rename, self.stacks) if new is not None)
        return StoredLayout(self.bare, stacks, self.embedding_as_output)

    def name_of_missing(self, name: str) -> str:
        """The name that a tensor would have if it were stored as its like are."""
        match = _EXPERT.match(name)
        if not (match and self.stacks):
            return self.stored_name(name)
        return self._outer(f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}{match[4] or ''}")

    def stack_of(self, name: str) -> str | None:
        """The stack that a tensor of the tables is a part of, by its name with ``model.``."""
        match = _EXPERT.match(name) if self.stacks else None
        if not match:
            return None
        stack = f"{match[1]}.{'down_proj' if match[3] == 'down' else 'gate_up_proj'}"
        return stack + (match[4] or "") if stack in self.stacks else None

    def stored_name(self, name: str) -> str:
        """The stored tensor that a tensor of the tables is, or is a part of."""
        return self._outer(self.stack_of(name) or name)

    def _outer(self, name: str) -> str:
        if self.embedding_as_output and name == EMBEDDING:
            return OUTPUT
        return name.removeprefix(BASE_PREFIX) if self.bare else name

    def written_name(self, name: str) -> str:
        """The name under which a tensor is written at first: its own where it is to be stacked."""
        return name if self.stack_of(name) else self.stored_name(name)

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """The stored tensors, each with the tensors of the tables that it consists of, in order."""
        found: dict[str, list[str]] = {}
        for name in names:
            found.setdefault(self.stored_name(name), []).append(name)
        return {stored: sorted(parts, key=_order) if len(parts) > 1 else parts for stored, parts in found.items()}

    def places(self, stored: str, num_experts: int) -> dict[str, Place]:
        """The tensors of the tables that a stored tensor is or consists of, each with its place.

        Args:
            num_experts: its length, which says of a stack how many experts it holds.
        """
        name = _full_name(stored) if self.bare else stored
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


def _full_name(name: str) -> str:
    return BASE_PREFIX + name if is_of_base_model(name) else name


def _order(name: str) -> tuple[int, str]:
    match = _EXPERT.match(name)
    assert match, name
    return int(match[2]), match[3]  # gate before up
