"""Construction of one rank's part of a model: configuration, layer specs, gates."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import RowParallelLinear, set_tensor_model_parallel_attributes
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import is_te_min_version

from megaprune import device
from megaprune.mcore.layer_specs import block_spec, mtp_block_spec
from megaprune.mcore.layers import mark
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.multi_token import LogitsModel
from megaprune.mcore.overrides import Overrides
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import layout_string
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.rotary import attending_layers, scale_rope, softmax_scale
from megaprune.models import Architecture
from megaprune.models.shards import padded_vocab_size
from megaprune.utils.errors import MegapruneError, UsageError


@dataclass(frozen=True)
class EngineOptions:
    """Settings of Megatron-Core that change how a model runs, but not its results (up to rounding)."""

    sizes: ParallelSizes
    transformer_engine: bool = False
    bf16: bool = False
    recompute_granularity: str | None = None
    seq_length: int = 4096
    recompute_modules: tuple[str, ...] = ()
    overlap_grad_reduce: bool = False
    token_dispatcher: str = "alltoall"
    overrides: Overrides = field(default_factory=Overrides)


def check_parallel_sizes(arch: Architecture, sizes: ParallelSizes, world_size: int) -> None:
    """Check that the parallel sizes divide the model and the number of processes.

    Raises:
        UsageError: a size does not fit; the message names its flag.
    """
    if world_size % sizes.model:
        raise UsageError(
            f"{world_size} processes cannot be divided into --tensor-model-parallel-size {sizes.tensor} x "
            f"--pipeline-model-parallel-size {sizes.pipeline} x --context-parallel-size {sizes.context}: the number "
            f"of processes must be a multiple of {sizes.model}"
        )
    fields = arch.transformer
    divided = [
        ("--tensor-model-parallel-size", sizes.tensor, "attention heads", fields["num_attention_heads"]),
        ("--tensor-model-parallel-size", sizes.tensor, "key-value heads", arch.query_groups),
        ("--tensor-model-parallel-size", sizes.tensor, "MLP columns", fields["ffn_hidden_size"]),
    ]
    if arch.mla:
        latent = fields["kv_lora_rank"] + fields["qk_pos_emb_head_dim"]
        divided += [
            ("--tensor-model-parallel-size", sizes.tensor, "query latents", fields["q_lora_rank"] or 0),
            ("--tensor-model-parallel-size", sizes.tensor, "key-value latents with RoPE", latent),
        ]
    if arch.num_experts:
        shared = fields.get("moe_shared_expert_intermediate_size", 0)
        divided += [
            ("--tensor-model-parallel-size", sizes.tensor, "shared experts' columns", shared),
            ("--expert-model-parallel-size", sizes.expert, "experts", arch.num_experts),
            ("--expert-tensor-parallel-size", sizes.expert_tensor, "expert columns", fields["moe_ffn_hidden_size"]),
        ]
    for flag, size, unit, number in divided:
        if number % size:
            raise UsageError(f"{flag} {size} does not divide the model's {number} {unit}")
    _check_expert_sizes(arch, sizes, world_size)
    if sizes.sequence_parallel and sizes.tensor == 1:
        raise UsageError("--sequence-parallel needs --tensor-model-parallel-size > 1")


def _check_expert_sizes(arch: Architecture, sizes: ParallelSizes, world_size: int) -> None:
    """Check the sizes of expert parallelism; raise UsageError with the flag to change."""
    experts = sizes.expert * sizes.expert_tensor
    if arch.num_experts and sizes.tensor > 1 and not sizes.sequence_parallel:
        raise UsageError("experts under --tensor-model-parallel-size > 1 need --sequence-parallel")
    if arch.num_experts and arch.mlp_bias and sizes.expert_tensor > 1:
        raise UsageError(
            f"--expert-tensor-parallel-size {sizes.expert_tensor}: Megatron-Core does not split experts that have "
            "biases: choose 1"
        )
    if experts == 1:
        return
    if not arch.num_experts:
        raise UsageError("--expert-model-parallel-size and --expert-tensor-parallel-size are for models with experts")
    if (world_size // sizes.pipeline) % experts:
        raise UsageError(
            f"--expert-model-parallel-size {sizes.expert} x --expert-tensor-parallel-size {sizes.expert_tensor} does "
            f"not divide the {world_size // sizes.pipeline} processes of a pipeline stage"
        )


def transformer_config(arch: Architecture, stages: Sequence[int], options: EngineOptions) -> TransformerConfig:
    """Return Megatron-Core's configuration of a model.

    Args:
        arch: architecture of the model.
        stages: number of layers on each pipeline stage.
        options: parallel sizes, precision and kernels.

    Raises:
        MegapruneError: the stages do not add up to the model's layers.
    """
    if sum(stages) != arch.num_layers:
        raise MegapruneError(f"pipeline stages {list(stages)} hold {sum(stages)} layers, not {arch.num_layers}")
    sizes = options.sizes
    recompute: dict[str, Any] = {}
    if options.recompute_granularity:
        recompute["recompute_granularity"] = options.recompute_granularity
    if options.recompute_modules:
        recompute["recompute_modules"] = list(options.recompute_modules)
    if options.recompute_granularity == "full":
        recompute |= dict(recompute_method="uniform", recompute_num_layers=1)
    fused = options.transformer_engine
    if fused and arch.transformer.get("softmax_type") == "learnable" and not is_te_min_version("2.8.0"):
        raise UsageError(
            "attention sinks need Transformer Engine 2.8 or newer: install it, or choose --transformer-impl local"
        )
    activation = _activation(arch, fused)
    fields = dict(
        **arch.transformer,
        **recompute,
        **(_expert_fields(options) if arch.num_experts else {}),
        tensor_model_parallel_size=sizes.tensor,
        pipeline_model_parallel_size=sizes.pipeline,
        context_parallel_size=sizes.context,
        sequence_parallel=sizes.sequence_parallel,
        pipeline_model_parallel_layout=layout_string(stages, arch.num_mtp) if sizes.pipeline > 1 else None,
        mtp_num_layers=arch.num_mtp or None,
        pipeline_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        params_dtype=torch.bfloat16 if options.bf16 else torch.float32,
        bf16=options.bf16,
        deallocate_pipeline_outputs=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=activation,
        add_bias_linear=arch.mlp_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        softmax_scale=softmax_scale(arch),
        # All weights are loaded afterwards, so random initialization would waste time. perform_initialization must
        # stay on: without it, 0.16.1 does not mark which weights are split over tensor-parallel ranks, and the
        # gradient norm includes only the parts of the first rank.
        init_method=_leave_undefined,
        output_layer_init_method=_leave_undefined,
        use_cpu_initialization=False,
        # These fused kernels require Transformer Engine or apex.
        bias_activation_fusion=fused and activation in (F.silu, quick_gelu),
        bias_dropout_fusion=fused and not (arch.num_experts and arch.mlp_bias),
        masked_softmax_fusion=fused,
        # 0.16.1 rejects fused RoPE in latent attention unless it is YaRN.
        apply_rope_fusion=fused and (not arch.mla or arch.transformer["rope_type"] == "yarn"),
        gradient_accumulation_fusion=False,
        persist_layer_norm=fused,
        transformer_impl="transformer_engine" if options.transformer_engine else "local",
    )
    chosen = options.overrides.transformer
    try:
        return (MLATransformerConfig if arch.mla else TransformerConfig)(**{**fields, **chosen})
    except (AssertionError, ImportError, ValueError) as error:
        if not (chosen or options.recompute_modules or options.token_dispatcher != "alltoall"):
            raise
        raise UsageError(
            "Megatron-Core refuses the options of --override, --recompute-modules and --moe-token-dispatcher-type: "
            + " ".join(str(error).split())
        ) from None


def _leave_undefined(weight: torch.Tensor) -> None:
    """Initialize nothing."""


def _expert_fields(options: EngineOptions) -> dict[str, Any]:
    """Return the configuration of experts: all-to-all dispatch, fp32 routing, no load balancing."""
    return dict(
        expert_model_parallel_size=options.sizes.expert,
        expert_tensor_parallel_size=options.sizes.expert_tensor,
        moe_token_dispatcher_type=options.token_dispatcher,
        moe_grouped_gemm=options.transformer_engine,
        moe_router_dtype="fp32",
        # Load balancing would move the student, and even the bias of a frozen router, away from the teacher.
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_bias_update_rate=0.0,
    )


def uses_transformer_engine(model: PipelineModel) -> bool:
    """Return whether the model was built from Transformer Engine layers."""
    return model.config.transformer_impl == "transformer_engine"


def is_gated(model: PipelineModel) -> bool:
    """Return whether the layers of a model have a gate."""
    return any(getattr(layer, "gate", None) is not None for _, layer in model.layers())


def build_model(
    arch: Architecture, stages: Sequence[int], options: EngineOptions, gate: LayerGate | None = None
) -> PipelineModel:
    """Build this rank's part of the model on the run's device, with uninitialized weights.

    Args:
        arch: architecture of the model.
        stages: number of layers on each pipeline stage.
        options: parallel sizes, precision and kernels.
        gate: gate that all layers share; None builds layers without a gate.

    Raises:
        MegapruneError: the stages do not add up to the model's layers.
    """
    chunk = _build_chunk(arch, transformer_config(arch, stages, options), options, gate)
    expected = stages[parallel_state.get_pipeline_model_parallel_rank()]
    if len(chunk.decoder.layers) != expected:
        raise MegapruneError(f"a pipeline stage was built with {len(chunk.decoder.layers)} layers, not {expected}")
    return PipelineModel([chunk])


def _build_chunk(
    arch: Architecture, config: TransformerConfig, options: EngineOptions, gate: LayerGate | None
) -> GPTModel:
    """Build the chunk of this rank on the run's device, with uninitialized weights."""
    model = LogitsModel(
        config,
        block_spec(arch, config, options.transformer_engine, gated=gate is not None),
        mtp_block_spec=mtp_block_spec(arch, config, options.transformer_engine),
        vocab_size=padded_vocab_size(arch.vocab_size, options.sizes.tensor),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        rotary_base=arch.rotary_base,
        rotary_percent=arch.rotary_dim / arch.head_dim if arch.rotary_dim else 1.0,
        scatter_embedding_sequence_parallel=options.sizes.sequence_parallel,
    )
    scale_rope(model, arch)
    if arch.latent_norm_epsilon is not None:
        _set_latent_epsilon(model, arch.latent_norm_epsilon)
    for layer in model.decoder.layers if gate is not None else ():
        layer.gate = gate
    if model.pre_process and arch.embedding_factor is not None:
        model.embedding.register_forward_hook(partial(_scale, arch.embedding_factor))
    if model.pre_process and config.recompute_granularity == "full":
        # Activation recompute yields no gradients for a layer's parameters or mask unless the layer's input requires
        # a gradient. The output of a frozen embedding does not.
        model.embedding.register_forward_hook(_require_gradient)
    _correct_attributes(model)
    return model.to(device.torch_device())


def _correct_attributes(model: GPTModel) -> None:
    """Correct attributes by which the core reduces gradients and takes their norm."""
    for name, module in model.named_modules():
        if ".experts." in name and isinstance(module, RowParallelLinear) and module.bias is not None:
            # The core adds the bias in place, which autograd refuses for the output of a reduction over one rank.
            module.explicit_expert_comm = True
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # At EP 1, 0.16.1 reduces the experts' gradients over the data-parallel group of dense weights. That is
            # the wrong group if ETP differs from TP.
            parameter.allreduce = False
            # It also takes a bias for one that all tensor-parallel ranks hold. They have other experts, or are
            # data-parallel ranks of the same ones.
            mark(parameter, sequence_parallel=False, tensor_model_parallel=True)
        if name.endswith(".softmax_offset"):
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)


def _set_latent_epsilon(model: GPTModel, epsilon: float) -> None:
    """Set the epsilon of the norms within latent attention; the core uses the same epsilon for all norms."""
    for layer in attending_layers(model):
        for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
            # Transformer Engine fuses these norms into the projections that follow them.
            part = getattr(layer.self_attention, name, None)
            if part is not None and hasattr(part, "eps"):
                part.eps = epsilon


def _scale(factor: float, module: torch.nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """Multiply a module's output by a factor, which is rounded to the output's dtype (a forward hook)."""
    return output * torch.tensor(factor, dtype=output.dtype, device=output.device)


def _activation(arch: Architecture, fused: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the activation of MLPs, by the name that the core has a fused kernel for."""
    if arch.gelu:
        return _gelu
    if arch.sigmoid_factor == 1:
        return F.silu
    return quick_gelu if fused and arch.sigmoid_factor == 1.702 else partial(_swish, arch.sigmoid_factor)


def _swish(factor: float, values: torch.Tensor) -> torch.Tensor:
    return values * torch.sigmoid(factor * values)


def _gelu(values: torch.Tensor) -> torch.Tensor:
    """Return GELU by its approximation with tanh."""
    return F.gelu(values, approximate="tanh")


def _require_gradient(module: torch.nn.Module, inputs: tuple[Any, ...], hidden_states: torch.Tensor) -> None:
    """Make a module's output require a gradient (a forward hook)."""
    if torch.is_grad_enabled():
        hidden_states.requires_grad_()


def train_only(model: PipelineModel, layers: Collection[int]) -> None:
    """Freeze all weights except those of the given layers, numbered from 0 over all pipeline stages."""
    model.requires_grad_(False)
    for number, layer in model.layers():
        if number in layers:
            layer.requires_grad_(True)

    def with_gradient(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        # The schedule sends gradients back through every stage, including stages without trainable weights.
        if output.requires_grad or not torch.is_grad_enabled():
            return output
        return output.detach().requires_grad_().clone()  # not a leaf, so that the schedule can free it after sending

    for chunk in model.chunks:
        chunk.register_forward_hook(with_gradient)


def in_half_precision(model: PipelineModel, options: EngineOptions) -> PipelineModel:
    """Return the model in Megatron's bf16 wrapper if the run uses bf16, otherwise the model itself.

    Only parameters are converted to bf16. Megatron's wrapper also rounds buffers, among them the routers' biases, which
    the core and transformers keep in fp32. The core converts these back to fp32, but only after they have lost
    precision.
    """
    if not options.bf16:
        return model
    buffers = [
        (module, name, buffer)
        for chunk in model.chunks
        for module in chunk.modules()
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False)
    ]
    wrappers = [Float16Module(model.config, chunk) for chunk in model.chunks]
    for module, name, buffer in buffers:
        module._buffers[name] = buffer
    return PipelineModel(model.chunks, wrappers)
