"""Checks across settings: which go together, which exclude each other, and which a method has no use for."""

from megaprune.config.schema import (
    CALIBRATED,
    SEARCHES,
    WHAT_TO_PRUNE,
    Config,
    ModelConfig,
    PruneConfig,
    pruned_layers_of,
)
from megaprune.utils.errors import UsageError


def check_run(config: Config) -> None:
    """Check all that can be known before the model and the data are looked at.

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
    _check_cut(config)
    _check_teacher(config)
    training = config.recovery.train_iters > 0
    if not config.data.train_data and (training or config.prune.method in CALIBRATED):
        raise UsageError("--train-data is required" + (" when --train-iters is above 0" if training else ""))


def check_for_plan(config: Config) -> None:
    """Like a run's checks, where data, a run folder, what to prune and for how long may be left open.

    Raises:
        UsageError: names the flag.
    """
    _check_model(config.model)
    if config.prune.method == "manual" or any(getattr(config.prune, name) is not None for name in WHAT_TO_PRUNE):
        _check_what_to_prune(config.prune)
    if config.recovery.train_iters is not None:
        _check_iterations(config)
    _check_lora(config)


def check_for_caching(config: Config) -> None:
    """The checks of what a teacher's targets follow from; the flags of pruning and training are left alone.

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
    if (prune.method == "manual") != (prune.prune_layers is not None):
        raise UsageError("--prune-layers and --method manual go together")
    if prune.prune_layers is not None:
        pruned_layers_of(prune.prune_layers)


def _check_cut(config: Config) -> None:
    if config.prune.method == "clp" and config.prune.target_params is not None:
        raise UsageError(
            "--method clp finds a segment of a fixed number of layers: give --num-layers-to-prune or --prune-ratio, "
            "not --target-params"
        )
    if not config.needs_one_cut:
        return
    flag = "--stitch linear-patch" if config.stitches else "--recovery-layers endpoints"
    if config.prune.method not in ("clp", "exhaustive", "manual"):
        raise UsageError(f"{flag} needs one contiguous cut, which --method {config.prune.method} does not make")
    if config.stitches and not config.recovery.train_iters:
        raise UsageError("--stitch linear-patch fades while the model heals: it needs --train-iters above 0")
    if config.stitches and not config.data.train_data:
        raise UsageError("--stitch linear-patch needs --train-data")
    if config.tunes_endpoints and config.lora.lora_rank is not None:
        raise UsageError(
            "--recovery-layers endpoints trains two layers' own weights: leave --lora-rank out, or choose all"
        )


def _check_teacher(config: Config) -> None:
    teacher, logits = config.distillation.teacher, config.distillation.teacher_logits
    if (teacher == "cached") != (logits is not None):
        raise UsageError("--teacher cached and --teacher-logits go together")
    if teacher == "cached" and not config.distils:
        unused = "--distill-loss ce" if config.distillation.distill_loss == "ce" else "--train-iters 0"
        raise UsageError(f"--teacher cached has nothing to teach with {unused}: leave one of them out")


def _check_lora(config: Config) -> None:
    if config.lora.lora_rank is None:
        for name in ("lora_alpha", "lora_target_modules", "export_adapter"):
            if getattr(config.lora, name):
                raise UsageError(f"--{name.replace('_', '-')} needs --lora-rank")
        if config.distillation.teacher == "self":
            raise UsageError("--teacher self needs --lora-rank: without adapters the student's weights change")
    if config.lora.export_adapter and config.recovery.train_iters == 0:
        raise UsageError("--export-adapter needs --train-iters above 0: untrained, there is no adapter")


def _check_iterations(config: Config) -> None:
    train_iters = config.recovery.train_iters
    if config.search.criterion != "perplexity" and config.prune.method != "shortened":
        raise UsageError(f"--criterion is for --method shortened, not {config.prune.method}")
    if config.search.selection_budget and config.prune.method != "auto":
        raise UsageError(f"--selection-budget is for --method auto, not {config.prune.method}")
    if config.search.search_weights != "trained" and config.prune.method not in SEARCHES:
        raise UsageError(f"--search-weights is for methods that search, and --method {config.prune.method} does not")
    if config.own_masks and config.prune.method != "e3":
        raise UsageError(f"--mask-noise replica is for --method e3, not {config.prune.method}")
    if config.prune.method in SEARCHES:
        if train_iters == 0:
            raise UsageError(f"--method {config.prune.method} searches while it trains: --train-iters must be above 0")
        if not 1 <= config.search_iters <= train_iters:
            raise UsageError(f"--search-iters {config.search_iters} is not between 1 and --train-iters {train_iters}")
    elif config.prune.method == "clp" and config.search.search_iters is not None and config.search.search_iters < 1:
        raise UsageError(f"--search-iters {config.search.search_iters} is less than 1")
    elif config.search.search_iters and config.prune.method != "clp":
        raise UsageError(f"--search-iters is for methods that search, and --method {config.prune.method} does not")
    if train_iters and config.recovery.min_lr > config.recovery.lr:
        raise UsageError(f"--min-lr {config.recovery.min_lr} is above --lr {config.recovery.lr}")
    if train_iters and config.recovery.lr_warmup_iters >= train_iters:
        raise UsageError(
            f"--lr-warmup-iters {config.recovery.lr_warmup_iters} is not less than --train-iters {train_iters}"
        )
