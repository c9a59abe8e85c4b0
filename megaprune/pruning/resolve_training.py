"""The part of `resolve` that makes the options of training: adapters, optimizer, iterations."""

import importlib.util
from dataclasses import replace

from megaprune.config.schema import Config
from megaprune.mcore.averaging import first_averaged
from megaprune.mcore.builder import EngineOptions, transformer_config
from megaprune.mcore.layers.lora import TARGETS, LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions
from megaprune.mcore.overrides import read_overrides
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models import Architecture, HFConfig, family_of
from megaprune.pruning.options import TrainingOptions
from megaprune.utils.errors import UsageError


def lora_options(config: Config, arch: Architecture, hf_config: HFConfig) -> LoRAOptions | None:
    lora, family = config.lora, family_of(hf_config)
    if lora.lora_rank is None:
        return None
    rules = [rule for layer in range(arch.num_layers) for rule in family.layer_rules(arch, layer)]
    # An adapter of a matrix that the HF model holds in another order is not PEFT's.
    scattered = {rule.megatron.split(".")[-2] for rule in rules if rule.shard.scatters}
    modules = {rule.megatron.split(".")[-2] for rule in rules} - scattered
    known = [target for target in TARGETS if target in modules]
    unfit = next((target for target in lora.lora_target_modules if target in scattered), None)
    if unfit:
        raise UsageError(
            f"--lora-target-modules {unfit} is not supported in the family {family.model_type}, whose experts are "
            f"transposed and have gate and up in turn: choose from {' '.join(known)}"
        )
    unknown = [target for target in lora.lora_target_modules if target not in known]
    if unknown:
        raise UsageError(
            f"--lora-target-modules {unknown[0]} is not a linear layer of this model: choose from {' '.join(known)}"
        )
    alpha = 2.0 * lora.lora_rank if lora.lora_alpha is None else lora.lora_alpha
    return LoRAOptions(lora.lora_rank, alpha, tuple(lora.lora_target_modules) or tuple(known))


def optimizer_options(config: Config) -> OptimizerOptions:
    recovery = config.recovery
    return OptimizerOptions(
        lr=recovery.lr,
        min_lr=recovery.min_lr,
        lr_decay_style=recovery.lr_decay_style,
        lr_warmup_iters=recovery.lr_warmup_iters,
        train_iters=recovery.train_iters or 0,
        weight_decay=recovery.weight_decay,
        clip_grad=recovery.clip_grad,
        distributed=config.engine.use_distributed_optimizer,
        averaged_from=first_averaged(recovery.average_weights, config.search_iters, recovery.train_iters or 0),
    )


def training_options(config: Config, batch: int) -> TrainingOptions:
    return TrainingOptions(
        train_iters=config.recovery.train_iters or 0,
        search_iters=config.search_iters,
        global_batch_size=batch,
        seed=config.recovery.seed,
        trains_weights_in_search=config.search.search_weights == "trained",
        endpoints_only=config.tunes_endpoints,
        stitches=config.stitches,
        rounds=config.recovery.rounds,
        data_iters=config.recovery.train_iters or 0,
    )


def engine_options(
    config: Config, arch: Architecture, sizes: ParallelSizes, transformer_engine: bool, seq_length: int
) -> EngineOptions:
    """Return the options of Megatron-Core.

    Raises:
        UsageError: an option does not fit the model, or is not a field of the core's.
    """
    engine, dispatcher = config.engine, config.engine.moe_token_dispatcher_type
    if dispatcher != "alltoall" and not arch.num_experts:
        raise UsageError(f"--moe-token-dispatcher-type {dispatcher} is for models with experts: leave it out")
    if dispatcher == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise UsageError("--moe-token-dispatcher-type flex needs the package deep_ep (DeepEP), which is not installed")
    overrides = read_overrides(engine.override, arch.mla)
    for name in ("fp8", "fp4"):
        if overrides.transformer.get(name) and not transformer_engine:
            raise UsageError(f"--override transformer.{name} needs Transformer Engine's layers, which do not run here")
    options = EngineOptions(
        sizes,
        transformer_engine,
        config.recovery.bf16,
        engine.recompute_granularity,
        seq_length,
        tuple(engine.recompute_modules),
        engine.overlap_grad_reduce,
        dispatcher,
        overrides,
    )
    transformer_config(arch, [arch.num_layers], replace(options, sizes=replace(sizes, pipeline=1)))
    return options
