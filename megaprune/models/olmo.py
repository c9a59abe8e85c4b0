"""OLMo 2 and 3 (``olmo2``, ``olmo3``): norms after attention and MLP, none before, and norms over all heads of query
and key. In OLMo 3, three of four layers have a sliding window, and RoPE is scaled in the others only."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from megaprune.models.gqa import attention_rules, gqa_architecture
from megaprune.models.keys import edited
from megaprune.models.layer_settings import prune_layer_settings
from megaprune.models.rope import read_rope_by_type
from megaprune.models.settings import HFConfig, flag, whole
from megaprune.models.shards import COPY
from megaprune.models.tables import HF, MEGATRON, MLP_RULES, MODEL_RULES, Architecture, Family, WeightRule
from megaprune.models.windows import EVERY_FOURTH_FULL, FULL, SLIDING, no_windows, windows_by_type
from megaprune.utils.errors import MegapruneError

_THETA = 500000.0
_NORM_RULES = (
    WeightRule(MEGATRON + "post_attention_layernorm.weight", (HF + "post_attention_layernorm.weight",), COPY),
    WeightRule(MEGATRON + "post_mlp_layernorm.weight", (HF + "post_feedforward_layernorm.weight",), COPY),
)


def _of_both(arch: Architecture, config: HFConfig) -> Architecture:
    bias = flag(config, "attention_bias", False)
    return replace(arch, pre_norm=False, sandwich_norm=True, qk_norm_over_width=True, output_bias=bias)


def _olmo2(config: HFConfig) -> Architecture:
    return _of_both(gqa_architecture(config, max_positions=2048, **no_windows(config)), config)


def _olmo3(config: HFConfig) -> Architecture:
    positions = whole(config, "max_position_embeddings", 2048)
    if config.get("rope_theta", _THETA) != _THETA and not config.get("rope_parameters"):
        raise MegapruneError(
            f"olmo3: rope_theta {config['rope_theta']!r} is ambiguous: transformers does not use it in layers with a "
            "window; give rope_parameters by type of layer"
        )
    ropes = read_rope_by_type(config, positions, {FULL: _THETA, SLIDING: _THETA}, full=FULL)
    plain = edited(config, {}, without=("rope_theta", "rope_scaling", "rope_parameters"))
    arch = gqa_architecture(plain, 2048, **windows_by_type(config, EVERY_FOURTH_FULL))
    theta, scaling = ropes[FULL]
    arch = replace(arch, rotary_base=theta, rope_scaling=scaling)
    if "window_size" in arch.transformer and ropes[SLIDING] != ropes[FULL]:
        arch = replace(arch, window_rope=ropes[SLIDING])
    return _of_both(arch, config)


def _layer_rules(arch: Architecture, layer: int) -> Sequence[WeightRule]:
    return _NORM_RULES + attention_rules(arch) + MLP_RULES


OLMO2 = Family(model_type="olmo2", describe=_olmo2, model_rules=MODEL_RULES, layer_rules=_layer_rules)
OLMO3 = replace(
    OLMO2,
    model_type="olmo3",
    describe=_olmo3,
    prune_config=partial(prune_layer_settings, rules=(EVERY_FOURTH_FULL,)),
)
