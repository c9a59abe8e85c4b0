"""Layout of a Megatron-Core checkpoint: keys, sizes and offsets of its HF tensors, from the families' tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaprune.models import Architecture, Family, HFConfig, WeightRule
from megaprune.models.names import expert_key, hf_name, in_mtp_layer, mtp_prefix
from megaprune.models.shards import COPY, ShardKind
from megaprune.models.tables import CARRIED

if TYPE_CHECKING:
    import torch

# Tensors of an MTP layer outside its transformer layer.
_MTP = {
    "enorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "final_layernorm.weight",
}
UNREAD = CARRIED


@dataclass(frozen=True)
class Piece:
    """Chunk of a Megatron tensor, and the HF tensors that it consists of.

    Usually one HF tensor is one chunk. Tensors that a shard kind interleaves form one chunk together.

    Args:
        kind: the arrangement of the HF tensors in the chunk.
        front: number of dimensions of size 1 in front of those of the parameter.
    """

    key: str
    size: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    kind: ShardKind = COPY
    front: int = 0

    def runs(self, number: int, arch: Architecture, item_bytes: int) -> list[tuple[int, int]]:
        """Return the byte runs of one HF tensor in the chunk, in the tensor's order: first byte and length."""
        return self.kind.runs(number, self.shape, arch, item_bytes)

    def join(self, tensors: Sequence[torch.Tensor], arch: Architecture) -> torch.Tensor:
        """Return the chunk made of its HF tensors."""
        return self.kind.fuse(tensors, arch).reshape(self.shape)

    def split(self, chunk: torch.Tensor, arch: Architecture) -> list[torch.Tensor]:
        """Return the HF tensors in the chunk."""
        return self.kind.merge([chunk.reshape(self.shape[self.front :])], arch)


def pieces(family: Family, config: HFConfig, shapes: Mapping[str, tuple[int, ...]]) -> list[Piece]:
    """Return every chunk of a model's checkpoint. Each tensor is in exactly one chunk.

    Keys are those of a GPTModel with Transformer Engine's layers. Each layer has its own number. The vocabulary is
    not padded: Megatron-Core pads it when it loads the checkpoint.

    Args:
        shapes: shapes of all HF tensors of the model.
    """
    arch = family.architecture(config)
    rules = [(checkpoint_key(rule), rule) for rule in family.rules(config) if rule.export]
    num_mtp = sum(name.endswith(".eh_proj.weight") for name in shapes)
    rules += [(key, rule) for key, rule in mtp_rules(family, arch, num_mtp) if all(name in shapes for name in rule.hf)]
    found = [piece for key, rule in rules for piece in _of_rule(rule, key, shapes, arch)]
    taken = {name for piece in found for name in piece.hf}
    found += [
        Piece(UNREAD + name, shape, (0,) * len(shape), shape, (name,))
        for name, shape in shapes.items()
        if name not in taken
    ]
    return found


def checkpoint_key(rule: WeightRule) -> str:
    """Return the key of a rule's parameter; the routed experts of a layer share one key."""
    expert = expert_key(rule.megatron)
    return expert[0] if expert else rule.te or rule.megatron


def mtp_rules(family: Family, arch: Architecture, num_mtp: int) -> Iterator[tuple[str, WeightRule]]:
    """Return the rules of `num_mtp` MTP layers after the model's own layers, each with its key."""
    for number in range(num_mtp if family.mtp_keys else 0):
        layer, prefix = arch.num_layers + number, mtp_prefix(number)
        for theirs, ours in _MTP.items():
            yield prefix + ours, WeightRule(prefix + ours, (hf_name(layer, theirs),), COPY)
        for rule in family.layer_rules(arch, arch.num_layers - 1):  # its transformer layer is like the model's last
            for expert in range(arch.num_experts if rule.expert else 1):
                here = rule.at(layer, expert)
                yield in_mtp_layer(checkpoint_key(here), number), here


def _of_rule(rule: WeightRule, key: str, shapes: Mapping[str, tuple[int, ...]], arch: Architecture) -> Iterator[Piece]:
    expert = expert_key(rule.megatron)
    # experts are stacked along a dimension in front
    front, at = ((arch.num_experts,), (expert[1],)) if expert else ((), ())
    own = [shapes[name] for name in rule.hf]
    fused = rule.shard.fused_shape(own)
    ones, zeros, size = (1,) * len(front), (0,) * (len(fused) - 1), (*front, *fused)
    if rule.shard.interleaves:
        yield Piece(key, size, (*at, 0, *zeros), (*ones, *fused), rule.hf, rule.shard, len(front))
        return
    row = 0
    for name, shape in zip(rule.hf, own, strict=True):
        yield Piece(key, size, (*at, row, *zeros), (*ones, *shape), (name,), front=len(front))
        row += shape[0]
