"""The part of `resolve` that makes the options of training: adapters, optimizer, iterations."""

from megaprune.config.schema import Config
from megaprune.mcore.averaging import first_averaged
from megaprune.mcore.layers.lora import TARGETS, LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions
from megaprune.models import Architecture, HFConfig, family_of
from megaprune.pruning.options import TrainingOptions
from megaprune.utils.errors import UsageError


def lora_options(config: Config, arch: Architecture, hf_config: HFConfig) -> LoRAOptions | None:
    lora, family = config.lora, family_of(hf_config)
    if lora.lora_rank is None:
        return None
    rules = [rule for layer in range(arch.num_layers) for rule in family.layer_rules(arch, layer)]
    modules = {rule.megatron.split(".")[-2] for rule in rules}
    known = [target for target in TARGETS if target in modules]
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
