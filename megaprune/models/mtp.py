"""Weights of multi-token-prediction layers in a Megatron model, which follow the decoder on its last stage."""

from collections.abc import Iterator
from dataclasses import replace

from megaprune.models.names import hf_name, in_mtp_layer, mtp_prefix
from megaprune.models.shards import COLUMN, COPY
from megaprune.models.tables import Architecture, Family, WeightRule

# HF name within the layer -> Megatron name within the MTP layer, and the kind of shard
_OWN = {
    "enorm.weight": ("enorm.weight", COPY),
    "hnorm.weight": ("hnorm.weight", COPY),
    "eh_proj.weight": ("eh_proj.weight", COLUMN),
    "shared_head.norm.weight": ("final_layernorm.weight", COPY),
}


def mtp_parameter_rules(family: Family, arch: Architecture, num_mtp: int) -> Iterator[WeightRule]:
    """Yield the rules of the parameters of MTP layers; each has a transformer layer like the model's last.

    Args:
        arch: architecture of the whole model, after whose layers the MTP layers are numbered in HF names.
        num_mtp: number of MTP layers.
    """
    for number in range(num_mtp):
        layer = arch.num_layers + number
        for theirs, (ours, kind) in _OWN.items():
            yield WeightRule(mtp_prefix(number) + ours, (hf_name(layer, theirs),), kind)
        for rule in family.layer_rules(arch, arch.num_layers - 1):
            for expert in range(arch.num_experts if rule.expert else 1):
                here = rule.at(layer, expert)
                fused = in_mtp_layer(here.te, number) if here.te else None
                yield replace(here, megatron=in_mtp_layer(here.megatron, number), te=fused)
