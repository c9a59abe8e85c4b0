"""The shapes of HF tensors, which follow from the architecture: what a folder is checked against, and counted by."""

import re
from collections.abc import Iterable

from megaprune.models.tables import Architecture

# Dimensions by name, see `_dimensions`; HF's tensors are [out, in].
_SHAPES = {
    "model.embed_tokens.weight": ("vocabulary", "hidden"),
    "model.norm.weight": ("hidden",),
    "lm_head.weight": ("vocabulary", "hidden"),
    # norms of a layer
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "pre_mlp_layernorm.weight": ("hidden",),
    "post_mlp_layernorm.weight": ("hidden",),
    # grouped-query attention
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("key_value", "hidden"),
    "self_attn.v_proj.weight": ("key_value", "hidden"),
    "self_attn.q_proj.bias": ("query",),
    "self_attn.k_proj.bias": ("key_value",),
    "self_attn.v_proj.bias": ("key_value",),
    "self_attn.q_norm.weight": ("head",),
    "self_attn.k_norm.weight": ("head",),
    "self_attn.o_proj.weight": ("hidden", "attended"),
    # multi-head latent attention
    "self_attn.q_a_proj.weight": ("query_latent", "hidden"),
    "self_attn.q_a_layernorm.weight": ("query_latent",),
    "self_attn.q_b_proj.weight": ("query", "query_latent"),
    "self_attn.kv_a_proj_with_mqa.weight": ("latent_and_rope", "hidden"),
    "self_attn.kv_a_layernorm.weight": ("latent",),
    "self_attn.kv_b_proj.weight": ("key_value", "latent"),
    # MLP and experts
    "mlp.gate_proj.weight": ("mlp", "hidden"),
    "mlp.up_proj.weight": ("mlp", "hidden"),
    "mlp.down_proj.weight": ("hidden", "mlp"),
    "mlp.gate.weight": ("experts", "hidden"),
    "mlp.gate.e_score_correction_bias": ("experts",),
    "mlp.e_score_correction_bias": ("experts",),
    "mlp.experts.gate_proj.weight": ("expert", "hidden"),
    "mlp.experts.up_proj.weight": ("expert", "hidden"),
    "mlp.experts.down_proj.weight": ("hidden", "expert"),
    "mlp.shared_experts.gate_proj.weight": ("shared_expert", "hidden"),
    "mlp.shared_experts.up_proj.weight": ("shared_expert", "hidden"),
    "mlp.shared_experts.down_proj.weight": ("hidden", "shared_expert"),
}
_LAYER_PREFIX, _EXPERT_INDEX = re.compile(r"^model\.layers\.\d+\."), re.compile(r"(?<=\.experts)\.\d+")


def hf_shapes(names: Iterable[str], arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The shapes that these tensors have in a model of this architecture.

    Raises:
        KeyError: no table above lists a name.
    """
    dimensions = _dimensions(arch)
    return {name: tuple(dimensions[dimension] for dimension in _SHAPES[_without_indices(name)]) for name in names}


def _without_indices(name: str) -> str:
    return _EXPERT_INDEX.sub("", _LAYER_PREFIX.sub("", name))


def _dimensions(arch: Architecture) -> dict[str, int]:
    fields = arch.transformer
    heads = fields["num_attention_heads"]
    dimensions = dict(vocabulary=arch.vocab_size, hidden=fields["hidden_size"], mlp=fields["ffn_hidden_size"])
    if arch.mla:
        content, rope, value = fields["qk_head_dim"], fields["qk_pos_emb_head_dim"], fields["v_head_dim"]
        dimensions |= dict(
            query=heads * (content + rope),
            key_value=heads * (content + value),
            attended=heads * value,
            query_latent=fields["q_lora_rank"],
            latent=fields["kv_lora_rank"],
            latent_and_rope=fields["kv_lora_rank"] + rope,
        )
    else:
        query, key_value = heads * arch.head_dim, arch.query_groups * arch.head_dim
        dimensions |= dict(query=query, key_value=key_value, attended=query, head=arch.head_dim)
    if arch.num_experts:
        shared = fields.get("moe_shared_expert_intermediate_size")
        dimensions |= dict(experts=arch.num_experts, expert=fields["moe_ffn_hidden_size"], shared_expert=shared)
    return dimensions
