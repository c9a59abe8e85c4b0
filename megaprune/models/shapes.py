"""Shapes of HF tensors, which follow from the architecture. Attention kinds declare their own (`gqa`, `mla`)."""

from collections.abc import Iterable, Mapping

from megaprune.models.names import name_in_every_layer
from megaprune.models.tables import Architecture

# Dimensions by name, see `_dimensions`; HF's matrices are [out, in].
_SHAPES: Mapping[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocabulary", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocabulary", "hidden"),
    # norms of a layer
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "pre_mlp_layernorm.weight": ("hidden",),
    "post_mlp_layernorm.weight": ("hidden",),
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
    # MLP and experts
    "mlp.gate_proj.weight": ("mlp", "hidden"),
    "mlp.up_proj.weight": ("mlp", "hidden"),
    "mlp.down_proj.weight": ("hidden", "mlp"),
    "mlp.gate_up_proj.weight": ("gate_and_up", "hidden"),
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.bias": ("mlp",),
    "mlp.down_proj.bias": ("hidden",),
    "mlp.gate.weight": ("experts", "hidden"),
    "mlp.gate.e_score_correction_bias": ("experts",),
    "mlp.e_score_correction_bias": ("experts",),
    "mlp.experts.gate_proj.weight": ("expert", "hidden"),
    "mlp.experts.up_proj.weight": ("expert", "hidden"),
    "mlp.experts.down_proj.weight": ("hidden", "expert"),
    "block_sparse_moe.gate.weight": ("experts", "hidden"),
    "block_sparse_moe.e_score_correction_bias": ("experts",),
    "block_sparse_moe.experts.w1.weight": ("expert", "hidden"),
    "block_sparse_moe.experts.w3.weight": ("expert", "hidden"),
    "block_sparse_moe.experts.w2.weight": ("hidden", "expert"),
    # GPT-OSS, whose matrices of experts are [in, out]
    "mlp.router.weight": ("experts", "hidden"),
    "mlp.router.bias": ("experts",),
    "mlp.experts.gate_up_proj": ("hidden", "gate_and_up_of_expert"),
    "mlp.experts.gate_up_proj_bias": ("gate_and_up_of_expert",),
    "mlp.experts.down_proj": ("expert", "hidden"),
    "mlp.experts.down_proj_bias": ("hidden",),
    "mlp.shared_experts.gate_proj.weight": ("shared_expert", "hidden"),
    "mlp.shared_experts.up_proj.weight": ("shared_expert", "hidden"),
    "mlp.shared_experts.down_proj.weight": ("hidden", "shared_expert"),
}


def hf_shapes(names: Iterable[str], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shapes that these tensors have in a model of this architecture.

    Raises:
        KeyError: no table contains a name.
    """
    dimensions = _dimensions(arch) | arch.attention.dimensions(arch)
    shapes = {**_SHAPES, **arch.attention.shapes}
    return {name: tuple(dimensions[length] for length in shapes[name_in_every_layer(name)]) for name in names}


def _dimensions(arch: Architecture) -> dict[str, int]:
    fields = arch.transformer
    mlp = fields["ffn_hidden_size"]
    dimensions = dict(vocabulary=arch.vocab_size, hidden=fields["hidden_size"], mlp=mlp, gate_and_up=2 * mlp)
    if arch.num_experts:
        shared, expert = fields.get("moe_shared_expert_intermediate_size"), fields["moe_ffn_hidden_size"]
        dimensions |= dict(experts=arch.num_experts, expert=expert, gate_and_up_of_expert=2 * expert)
        dimensions |= dict(shared_expert=shared)
    return dimensions
