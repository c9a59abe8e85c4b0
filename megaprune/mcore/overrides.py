"""Fields of Megatron-Core's configurations that a user sets directly: `--override` and the sections of recipes."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from megaprune.utils.errors import UsageError

SECTIONS = ("transformer", "ddp", "optimizer")
_FLAGS = {
    "transformer": {
        **{
            name: "--" + name.replace("_", "-")
            for name in (
                *("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"),
                *("expert_tensor_parallel_size", "context_parallel_size", "sequence_parallel", "transformer_impl"),
                *("pipeline_model_parallel_layout", "recompute_granularity", "recompute_modules"),
                *("moe_token_dispatcher_type", "mtp_loss_scaling_factor"),
            )
        },
        "bf16": "--bf16",
        "mtp_num_layers": "--mtp",
    },
    "ddp": {
        "use_distributed_optimizer": "--use-distributed-optimizer",
        "overlap_grad_reduce": "--overlap-grad-reduce",
    },
    "optimizer": {
        "use_distributed_optimizer": "--use-distributed-optimizer",
        **{name: "--" + name.replace("_", "-") for name in ("lr", "min_lr", "weight_decay", "clip_grad", "bf16")},
    },
}
# Fields whose values follow from the model's config.json: another value would compute another function.
_OF_THE_MODEL = frozenset(
    (
        *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "ffn_hidden_size", "kv_channels"),
        *("softmax_scale", "softmax_type", "apply_residual_connection_post_layernorm", "layernorm_epsilon"),
        *("layernorm_zero_centered_gamma", "add_bias_linear", "add_qkv_bias", "gated_linear_unit", "activation_func"),
        *("glu_linear_offset", "activation_func_clamp_value", "rotary_interleaved", "window_size", "normalization"),
        *("window_attn_skip_freq", "qk_layernorm", "qk_l2_norm", "attention_output_gate", "multi_latent_attention"),
        *("no_rope_freq", "experimental_attention_variant", "linear_attention_freq", "num_moe_experts"),
        *("moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_layer_freq", "moe_ffn_hidden_size"),
        *("moe_router_topk", "moe_router_topk_limited_devices", "moe_router_num_groups", "moe_router_group_topk"),
        *("moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_score_function"),
        *("moe_router_enable_expert_bias", "moe_apply_probs_on_input", "moe_latent_size", "mrope_section"),
        *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type"),
        *("rotary_base", "rotary_percent", "rotary_scaling_factor", "original_max_position_embeddings"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "is_hybrid_model", "heterogeneous_block_specs"),
        *("fp32_residual_connection", "apply_query_key_layer_scaling", "mtp_standalone"),
    )
)
# Fields whose values a run depends on.
_OF_THE_RUN = {
    "transformer": frozenset(
        (
            *("fp16", "params_dtype", "pipeline_dtype", "virtual_pipeline_model_parallel_size", "hidden_dropout"),
            *(
                "attention_dropout",
                "perform_initialization",
                "use_cpu_initialization",
                "init_method",
                "init_method_std",
            ),
            *("output_layer_init_method", "embedding_init_method", "embedding_init_method_std"),
            *("init_model_with_meta_device", "num_layers_in_first_pipeline_stage"),
            *("num_layers_in_last_pipeline_stage", "account_for_embedding_in_pipeline_split"),
            *("account_for_loss_in_pipeline_split", "calculate_per_token_loss", "variable_seq_lengths"),
            *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps"),
            *("moe_router_bias_update_rate", "moe_router_force_load_balancing", "moe_token_dropping"),
            *("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_enable_routing_replay"),
            *("moe_extended_tp", "qk_clip", "test_mode", "hybrid_context_parallel"),
            *("hierarchical_context_parallel_sizes", "mlp_chunks_for_prefill"),
        )
    ),
    "ddp": frozenset(("overlap_param_gather", "use_megatron_fsdp", "use_custom_fsdp")),
    "optimizer": frozenset(
        (
            *("optimizer", "fp16", "params_dtype", "loss_scale", "decoupled_lr", "decoupled_min_lr"),
            *("overlap_param_gather", "overlap_param_gather_with_optimizer_step"),
        )
    ),
}


@dataclass(frozen=True)
class Overrides:
    """Checked values by field, for each of the core's configurations."""

    transformer: Mapping[str, Any] = field(default_factory=dict)
    ddp: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)


def read_overrides(assignments: Sequence[str], mla: bool) -> Overrides:
    """Return the values that assignments such as ``transformer.moe_permute_fusion=true`` give, the last one of a field.

    Args:
        mla: whether the model has multi-latent attention, whose configuration has fields of its own.

    Raises:
        UsageError: an assignment has another form, names no field or one that the run sets itself, or its value is of
            another type than the field.
    """
    configs = {
        "transformer": MLATransformerConfig if mla else TransformerConfig,
        "ddp": DistributedDataParallelConfig,
        "optimizer": OptimizerConfig,
    }
    found: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for text in assignments:
        target, equals, value = text.partition("=")
        section, dot, name = target.strip().partition(".")
        if not (equals and dot) or section not in configs:
            raise UsageError(
                f"--override {text!r} is not of the form SECTION.FIELD=VALUE with one of the sections "
                + ", ".join(SECTIONS)
            )
        found[section][name] = _value(configs[section], section, name, value.strip())
    return Overrides(**found)


def _value(config: type, section: str, name: str, text: str) -> Any:
    said = f"--override {section}.{name}"
    if name not in {each.name for each in dataclasses.fields(config)} or name.startswith("_"):
        raise UsageError(f"{said}: Megatron-Core's {config.__name__} has no such field")
    if name in _FLAGS[section]:
        raise UsageError(f"{said}: give {_FLAGS[section][name]} instead")
    if section == "transformer" and name in _OF_THE_MODEL:
        raise UsageError(f"{said} follows from the model and can't be set")
    if name in _OF_THE_RUN[section]:
        raise UsageError(f"{said} is set by the run and can't be changed")
    hint = get_type_hints(config)[name]
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    for kind in _alternatives(hint):
        matches, converted = _as(kind, value)
        if matches:
            return converted
    raise UsageError(f"{said}={text} is not {_described(hint)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _as(kind: Any, value: Any) -> tuple[bool, Any]:
    """Return whether a value read from text is of a type, and the value in that type."""
    if kind is type(None):
        return value is None, None
    if get_origin(kind) is Literal:
        return value in get_args(kind) and type(value) in map(type, get_args(kind)), value
    if kind in (bool, int, str):
        return type(value) is kind, value
    if kind is float:
        return _as_float(value)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return value in kind.__members__, kind.__members__.get(value)
    if get_origin(kind) in (list, tuple):
        items = [_as(get_args(kind)[0], item) for item in value] if isinstance(value, list) else []
        return isinstance(value, list) and all(ok for ok, _ in items), get_origin(kind)(item for _, item in items)
    return False, None


def _as_float(value: Any) -> tuple[bool, float]:
    """Return a number as a float. YAML reads 1e-5 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False, 0.0
    try:
        return True, float(value)
    except ValueError:
        return False, 0.0


def _described(hint: Any) -> str:
    """Return the values that a field takes, for an error."""
    words = []
    for kind in _alternatives(hint):
        if kind is type(None):
            words.append("null")
        elif get_origin(kind) is Literal:
            words.extend(map(str, get_args(kind)))
        elif isinstance(kind, type) and issubclass(kind, Enum):
            words.extend(kind.__members__)
        elif kind in (bool, int, float, str):
            words.append({bool: "true, false", int: "an integer", float: "a number", str: "a text"}[kind])
        elif get_origin(kind) in (list, tuple):
            words.append("a list")
        else:
            words.append("anything that text can give")
    return " or ".join(dict.fromkeys(words)) if len(words) > 1 else words[0]
