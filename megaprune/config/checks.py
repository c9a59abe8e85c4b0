"""Checks across settings: required combinations, exclusions, and flags that a method does not use."""

from megaprune.config.engine import EngineConfig
from megaprune.config.method_checks import check_budget, check_cut, check_method_flags, check_rounds, check_stitch
from megaprune.config.schema import (
    WHAT_TO_PRUNE,
    Config,
    ModelConfig,
    PruneConfig,
)
from megaprune.config.sizes import pruned_layers_of
from megaprune.selection import registry
from megaprune.utils.errors import UsageError


def check_run(config: Config) -> None:
    """Check everything that can be checked without reading the model and the data.

    Raises:
        UsageError: names the flag.
    """
    _check_model(config.model)
    if not config.run.save:
        raise UsageError("--save is required")
    _check_what_to_prune(config.prune)
    if config.recovery.train_iters is None:
        raise UsageError("--train-iters is required (0 removes layers and changes no weight)")
    _check_iterations(config)
    _check_lora(config)
    _check_engine(config.engine)
    check_cut(config)
    check_stitch(config)
    check_rounds(config)
    _check_teacher(config)
    training = config.recovery.train_iters > 0
    if not config.data.train_data and (training or config.method.calibrated):
        raise UsageError("--train-data is required" + (" when --train-iters is above 0" if training else ""))


def check_for_plan(config: Config) -> None:
    """Check a configuration for a plan: data, run folder, pruned size and iterations may be missing.

    Raises:
        UsageError: names the flag.
    """
    _check_model(config.model)
    if config.method.names_layers or any(getattr(config.prune, name) is not None for name in WHAT_TO_PRUNE):
        _check_what_to_prune(config.prune)
    if config.recovery.train_iters is not None:
        _check_iterations(config)
    _check_lora(config)
    _check_engine(config.engine)


def check_for_scoring(config: Config) -> None:
    """Check what scoring layers needs: a model, data, and a method that looks at calibration data.

    Raises:
        UsageError: names the flag.
    """
    _check_model(config.model)
    _check_what_to_prune(config.prune)
    if not config.method.calibrated:
        calibrated = ", ".join(method.name for method in registry.methods() if method.calibrated)
        raise UsageError(
            f"--method {config.prune.method} does not score layers on calibration data: choose one of {calibrated}"
        )
    if not config.data.train_data:
        raise UsageError("data is required: the text on which layers are scored")
    _check_iterations(config)
    check_cut(config)


def check_for_caching(config: Config) -> None:
    """Check the settings that determine the teacher's outputs; flags of pruning and training are not checked.

    Raises:
        UsageError: names the flag.
    """
    _check_model(config.model)
    if not config.data.train_data:
        raise UsageError("--train-data is required: the data that the runs will train on")


def _check_model(model: ModelConfig) -> None:
    if not (model.hf_model or model.load):
        raise UsageError("--hf-model is required (or --load, with a checkpoint)")
    if model.hf_model and model.load:
        raise UsageError("--hf-model and --load both name the model: give one of them")


def _check_what_to_prune(prune: PruneConfig) -> None:
    given = ["--" + name.replace("_", "-") for name in WHAT_TO_PRUNE if getattr(prune, name) is not None]
    if len(given) != 1:
        every = ", ".join("--" + name.replace("_", "-") for name in WHAT_TO_PRUNE)
        raise UsageError(f"give exactly one of {every}" + (f", not {' and '.join(given)}" if given else ""))
    check_budget(prune)
    for flag in ("target_memory_batch_size", "target_memory_seq_length"):
        if prune.target_memory is None and getattr(prune, flag) != getattr(PruneConfig(), flag):
            raise UsageError(f"--{flag.replace('_', '-')} needs --target-memory")
    if prune.prune_layers is not None:
        pruned_layers_of(prune.prune_layers)


def _check_teacher(config: Config) -> None:
    teacher, logits = config.distillation.teacher, config.distillation.teacher_logits
    if (teacher == "cached") != (logits is not None):
        raise UsageError("--teacher cached and --teacher-logits go together")
    alpha = config.distillation.kd_loss_alpha
    if config.distillation.distill_loss == "ce" and alpha not in (None, 1):
        raise UsageError(
            f"--kd-loss-alpha {alpha:g} mixes cross-entropy with a distillation loss, and --distill-loss ce has none: "
            "leave one of them out"
        )
    weight = config.distillation.hidden_loss_weight
    if weight and (teacher == "cached" or config.distillation.distill_loss == "ce"):
        without = "--teacher cached" if teacher == "cached" else "--distill-loss ce"
        raise UsageError(
            f"--hidden-loss-weight {weight:g} needs a teacher's hidden states, and there are none with {without}: use "
            "--teacher online or self, or leave it out"
        )
    _check_mtp(config)
    if teacher == "cached" and not config.distills:
        unused = "--distill-loss ce" if config.distillation.distill_loss == "ce" else "--train-iters 0"
        raise UsageError(f"--teacher cached is not used with {unused}: leave one of them out")


def _check_mtp(config: Config) -> None:
    if not config.distillation.mtp_loss_scaling_factor:
        return
    obstacles = {
        "--mtp drop": config.model.mtp == "drop",
        "--lora-rank": config.lora.lora_rank is not None,
        "--recovery-layers endpoints": config.tunes_endpoints,
    }
    for flag, given in obstacles.items():
        if given:
            raise UsageError(
                f"--mtp-loss-scaling-factor trains the MTP layers, which {flag} does not: leave one of them out"
            )


def _check_lora(config: Config) -> None:
    if config.lora.lora_rank is None:
        for name in ("lora_alpha", "lora_target_modules", "export_adapter"):
            if getattr(config.lora, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --lora-rank")
        if config.distillation.teacher == "self":
            raise UsageError("--teacher self needs --lora-rank: without adapters the student's weights change")
    if config.lora.export_adapter and config.recovery.train_iters == 0:
        raise UsageError("--export-adapter needs --train-iters above 0: without training there is no adapter")


def _check_engine(engine: EngineConfig) -> None:
    if engine.recompute_modules and engine.recompute_granularity != "selective":
        raise UsageError("--recompute-modules needs --recompute-granularity selective")


def _check_iterations(config: Config) -> None:
    train_iters = config.recovery.train_iters
    check_method_flags(config)
    if train_iters and config.recovery.min_lr > config.recovery.lr:
        raise UsageError(f"--min-lr {config.recovery.min_lr} is above --lr {config.recovery.lr}")
    if train_iters and config.recovery.lr_warmup_iters >= train_iters:
        raise UsageError(
            f"--lr-warmup-iters {config.recovery.lr_warmup_iters} is not less than --train-iters {train_iters}"
        )
