"""DeepSeek-V3 and R1 (``model_type: deepseek_v3``), and relatives with the same attention and experts.

Kimi-K2 (``kimi_k2``) differs in name and numbers only. GLM-4.7-Flash (``glm4_moe_lite``) may list the MLPs' types. In
DeepSeek-V3.2 (``deepseek_v32``) and GLM-5 (``glm_moe_dsa``), an indexer chooses the tokens that a token attends to, all
of them in short sequences; pruning carries its weights as they are.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megaprune.models.layer_settings import LayerRule, per_layer, prune_layer_settings
from megaprune.models.mla import (
    MLA,
    after_dense_prefix,
    group_fields,
    mla_fields,
    mla_rules,
    mlp_or_expert_rules,
    moe_layers_by_type,
    rope_fields,
    sigmoid_router_fields,
)
from megaprune.models.rope import read_rope
from megaprune.models.settings import flag, text, whole, whole_or_none
from megaprune.models.tables import (
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    WeightRule,
    carried_rule,
    mlp_norm_rule,
    refuse_true,
)
from megaprune.utils.errors import MegapruneError

# transformers' class and the makers' own code leave these norms at it, whatever rms_norm_eps is
_LATENT_NORM_EPSILON = 1e-6

# The router of every model of the family. transformers does not write these settings, and without them vLLM routes by
# softmax and without the biases of experts.
_ROUTING = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def _architecture(config: HFConfig) -> Architecture:
    return _describe(config, after_dense_prefix(config))


def _glm4_moe_lite(config: HFConfig) -> Architecture:
    return _describe(config, moe_layers_by_type(config, _FIRST_DENSE))


def _deepseek_v32(config: HFConfig) -> Architecture:
    return _with_indexer(config, heads=64)


def _glm_moe_dsa(config: HFConfig) -> Architecture:
    name, num_layers = config.get("model_type"), whole(config, "num_hidden_layers")
    config.get("indexer_rope_interleave")  # of the indexer alone
    per_layer(config, "indexer_types", num_layers, ("full",))
    whole(config, "index_skip_topk_offset", 2, least=0)
    if whole(config, "index_topk_freq", 1) != 1 or set(config.get("index_topk_pattern") or "F") - {"F", "full"}:
        raise MegapruneError(f"{name}: layers that share the choice of an earlier indexer are not supported")
    return _with_indexer(config, heads=32)


def _with_indexer(config: HFConfig, heads: int) -> Architecture:
    refuse_true(config, "mlp_bias")
    arch = _describe(config, moe_layers_by_type(config, _DENSE_PREFIX), "indexed_attention")
    if arch.transformer["q_lora_rank"] is None:
        raise MegapruneError(
            f"{config.get('model_type')}: q_lora_rank null is not supported: the indexer reads the query's latent"
        )
    return replace(
        arch,
        longest_sequence=whole(config, "index_topk", 2048),
        index_heads=whole(config, "index_n_heads", heads),
        index_head_dim=whole(config, "index_head_dim", 128),
    )


def _describe(config: HFConfig, moe_layers: Sequence[bool], layer_type: str = "full_attention") -> Architecture:
    name = config.get("model_type")
    fields = mla_fields(config, layer_type)
    fields |= sigmoid_router_fields(config, moe_layers) | group_fields(config)
    if whole(config, "moe_layer_freq", 1) != 1:
        raise MegapruneError(f"{name}: moe_layer_freq {config['moe_layer_freq']} is not supported, only 1")
    text(config, "topk_method", "noaux_tc", only="noaux_tc")
    if not flag(config, "rope_interleave", True):
        raise MegapruneError(
            f"{name}: rope_interleave false is not supported: Megatron-Core's latent attention rotates neighboring "
            "dimensions, as rope_interleave true does"
        )
    rope_dim = fields["qk_pos_emb_head_dim"]
    if whole_or_none(config, "head_dim", None) not in (None, rope_dim):
        raise MegapruneError(f"{name}: head_dim {config['head_dim']} is not qk_rope_head_dim {rope_dim}")
    positions = whole(config, "max_position_embeddings", 4096)
    theta, scaling = read_rope(config, positions, also_read=("rope_interleave",))
    return Architecture(
        transformer=fields | rope_fields(theta, scaling) | dict(moe_router_enable_expert_bias=True),
        attention=MLA,
        vocab_size=whole(config, "vocab_size"),
        max_position_embeddings=positions,
        rotary_base=theta,
        rope_scaling=scaling,
        tied=flag(config, "tie_word_embeddings", False),
        latent_norm_epsilon=_LATENT_NORM_EPSILON,
    )


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    norm = mlp_norm_rule("post_attention_layernorm", arch.is_moe(layer))
    return (*mla_rules(arch), norm, *mlp_or_expert_rules(arch, layer))


def _v32_layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    return (*_layer_rules(arch, layer), *_INDEXER_RULES)


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    pruned = prune_layer_settings(config, kept, prefixes=(_PREFIX,))
    return pruned | {name: value for name, value in _ROUTING.items() if name not in pruned}


def _types_by_prefix(config: HFConfig, default: int) -> list[str]:
    dense = config.get("first_k_dense_replace")
    dense = default if dense is None else dense
    return ["sparse" if layer >= dense else "dense" for layer in range(config["num_hidden_layers"])]


_PREFIX = "first_k_dense_replace"
# What transformers assumes without the list; in GLM-4.7-Flash, whatever `first_k_dense_replace` is.
_FIRST_DENSE = LayerRule(
    "mlp_layer_types", lambda config: ["sparse" if layer else "dense" for layer in range(config["num_hidden_layers"])]
)
_DENSE_PREFIX = LayerRule("mlp_layer_types", partial(_types_by_prefix, default=3))
_INDEXER_RULES = tuple(
    carried_rule(f"self_attn.indexer.{name}")
    for name in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight")
)

FAMILY = Family(
    model_type="deepseek_v3",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
    ignored=(r"rotary_emb\.inv_freq$",),
    mtp_keys=("num_nextn_predict_layers",),
)
KIMI_K2 = replace(FAMILY, model_type="kimi_k2", stacks_experts=False)
GLM4_MOE_LITE = replace(
    FAMILY,
    model_type="glm4_moe_lite",
    describe=_glm4_moe_lite,
    prune_config=partial(prune_layer_settings, prefixes=(_PREFIX,), rules=(_FIRST_DENSE,)),
)
DEEPSEEK_V32 = replace(
    FAMILY,
    model_type="deepseek_v32",
    describe=_deepseek_v32,
    layer_rules=_v32_layer_rules,
    prune_config=partial(prune_layer_settings, prefixes=(_PREFIX,), rules=(_DENSE_PREFIX,)),
)
GLM_MOE_DSA = replace(DEEPSEEK_V32, model_type="glm_moe_dsa", describe=_glm_moe_dsa)
