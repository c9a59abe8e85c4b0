"""GLM-4.5, 4.6 and 4.7 (``model_type: glm4_moe``): experts behind a dense prefix, grouped-query attention with a bias
on query, key and value, and RoPE on half of each head."""

from collections.abc import Sequence

from megaprune.models.gqa import INPUT_NORM_RULES, attention_rules, gqa_architecture
from megaprune.models.layer_settings import prune_layer_settings
from megaprune.models.mla import (
    after_dense_prefix,
    group_fields,
    mlp_or_expert_rules,
    sigmoid_router_fields,
)
from megaprune.models.settings import flag
from megaprune.models.tables import (
    MODEL_RULES,
    Architecture,
    Family,
    HFConfig,
    WeightRule,
    mlp_norm_rule,
)
from megaprune.models.windows import no_windows


def _architecture(config: HFConfig) -> Architecture:
    router = sigmoid_router_fields(config, after_dense_prefix(config, default=1)) | group_fields(config)
    return gqa_architecture(
        config,
        max_positions=131072,
        groups=8,
        partial=0.5,
        add_qkv_bias=flag(config, "attention_bias", False),
        qk_layernorm=flag(config, "use_qk_norm", False),
        moe_router_enable_expert_bias=True,
        **router,
        **no_windows(config),
    )


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    norm = mlp_norm_rule("post_attention_layernorm", arch.is_moe(layer))
    return (*INPUT_NORM_RULES, norm, *attention_rules(arch), *mlp_or_expert_rules(arch, layer))


def _prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    full = {"first_k_dense_replace": 1} | config
    return prune_layer_settings(full, kept, prefixes=("first_k_dense_replace",))


FAMILY = Family(
    model_type="glm4_moe",
    describe=_architecture,
    model_rules=MODEL_RULES,
    layer_rules=_layer_rules,
    prune_config=_prune_config,
    mtp_keys=("num_nextn_predict_layers",),
)
