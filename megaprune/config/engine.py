"""Flags of the model's engine: adapters, parallelism and Megatron-Core's own options."""

from dataclasses import dataclass
from typing import Literal

from megaprune.config.fields import flag


@dataclass
class LoRAConfig:
    """Low-rank adapters, trained instead of the weights."""

    _argument_group_name = "LoRA"
    lora_rank: int | None = flag("rank of the adapters; enables LoRA", least=1)
    lora_alpha: float | None = flag(
        "LoRA alpha: adapters are scaled by alpha / rank (default: twice the rank)", above=0
    )
    lora_target_modules: list[str] = flag(
        "linear layers that get adapters, by their Megatron names, such as linear_qkv linear_proj (default: all)", []
    )
    export_adapter: bool = flag("export the adapters in PEFT's format, next to the untrained pruned model", False)


@dataclass
class ParallelConfig:
    """Distribution of the model over processes."""

    _argument_group_name = "parallelism"
    tensor_model_parallel_size: int = flag("number of tensor-parallel ranks", 1, least=1)
    pipeline_model_parallel_size: int = flag("number of pipeline stages", 1, least=1)
    expert_model_parallel_size: int = flag(
        "number of ranks among which the experts of each layer are distributed", 1, least=1
    )
    expert_tensor_parallel_size: int | None = flag(
        "number of ranks that split each expert (default: the tensor-parallel size if there are enough processes, "
        "otherwise 1; always 1 if experts have biases)",
        least=1,
    )
    context_parallel_size: int = flag("number of context-parallel ranks; only 1 is supported", 1, least=1)
    sequence_parallel: bool = flag("split activations along the sequence over tensor-parallel ranks", False)
    pipeline_model_parallel_layout: str | None = flag(
        "pipeline stages of the original model, such as Ettt|tttL (default: balanced); the stages of the pruned model "
        "are always balanced"
    )
    distributed_timeout_minutes: int = flag(
        "limit of each collective operation, in every process group; work of rank 0 that the others wait for has none",
        60,
        least=1,
    )


@dataclass
class EngineConfig:
    """Options of Megatron-Core."""

    _argument_group_name = "engine"
    transformer_impl: Literal["auto", "transformer_engine", "local"] = flag(
        "layer implementation; auto uses Transformer Engine if it is available", "auto"
    )
    use_distributed_optimizer: bool = flag("shard the optimizer state over data-parallel ranks", False)
    recompute_granularity: Literal["selective", "full"] | None = flag(
        "recompute activations in the backward pass: full recomputes whole layers, selective only the attention "
        "(default: none)"
    )
    recompute_modules: list[str] = flag(
        "with --recompute-granularity selective: modules that are recomputed, by Megatron-Core's names, such as "
        "core_attn mla_up_proj moe_act mlp moe (default: core_attn)",
        [],
    )
    overlap_grad_reduce: bool = flag(
        "reduce gradients over data-parallel ranks during the backward pass of recovery. The search does not overlap: "
        "masked layers have no backward pass",
        False,
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = flag(
        "exchange of tokens between the ranks that hold experts; flex needs DeepEP or HybridEP", "alltoall"
    )
    override: list[str] = flag(
        "fields of Megatron-Core's own configurations, as SECTION.FIELD=VALUE with the sections transformer "
        "(TransformerConfig), ddp (DistributedDataParallelConfig) and optimizer (OptimizerConfig), such as "
        "transformer.moe_permute_fusion=true; a recipe may also have these sections",
        [],
        sections=("transformer", "ddp", "optimizer"),
    )
