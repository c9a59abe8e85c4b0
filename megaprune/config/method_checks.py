"""Checks of a run's flags against the traits of its method."""

from megaprune.config.fields import flag_name
from megaprune.config.schema import Config, PruneConfig
from megaprune.selection import registry
from megaprune.selection.registry import BudgetKind
from megaprune.utils.errors import UsageError

# The flags that give the size of the pruned model, by the kind of budget.
_BUDGETS: dict[str, BudgetKind] = {
    "num_layers_to_prune": "layers",
    "prune_ratio": "layers",
    "target_params": "parameters",
    "target_active_params": "parameters",
    "target_memory": "parameters",
    "prune_layers": "list",
}
# Flags of the group "search" that are refused unless the method uses them.
_OWN_FLAGS = (
    *("criterion", "selection_budget", "search_weights", "search_iters", "search_preset"),
    *("heal_candidates", "heal_iters"),
)
# Settings of trained scores, which the default search of e3 does not have.
_TRAINED_SCORES = ("mask_lr", "mask_init_scale")


def check_budget(prune: PruneConfig) -> None:
    """Check that the method supports the given kind of budget.

    Raises:
        UsageError: it does not.
    """
    method = registry.find(prune.method)
    kind, flag = next((kind, flag) for flag, kind in _BUDGETS.items() if getattr(prune, flag) is not None)
    if kind in method.budgets:
        return
    if kind == "list" or method.names_layers:
        listing = " or ".join(other.name for other in registry.methods() if other.names_layers)
        raise UsageError(f"--prune-layers and --method {listing} go together")
    counts = "finds a segment of a fixed number of layers" if method.contiguous else "counts layers"
    if kind == "layers":
        targets = " or ".join(flag_name(name) for name, kind in _BUDGETS.items() if kind == "parameters")
        raise UsageError(f"--method {prune.method} counts parameters: give {targets}, not {flag_name(flag)}")
    raise UsageError(
        f"--method {prune.method} {counts}: give --num-layers-to-prune or --prune-ratio, not {flag_name(flag)}"
    )


def check_method_flags(config: Config) -> None:
    """Check that the method uses the given search flags, and that the iterations are valid for it.

    Raises:
        UsageError: names the flag.
    """
    method, name, train_iters = config.method, config.prune.method, config.recovery.train_iters or 0
    defaults = type(config.search)()
    for flag in _OWN_FLAGS:
        given = getattr(config.search, flag) not in (0, getattr(defaults, flag))
        if given and flag not in method.flags:
            raise UsageError(f"{flag_name(flag)} is for {_takers(flag, name)}")
    if "search_preset" in method.flags and config.search.search_preset == "measured":
        for flag in _TRAINED_SCORES:
            if getattr(config.search, flag) is not None:
                raise UsageError(f"{flag_name(flag)} is for --search-preset paper: measured values are not trained")
    elif "search_preset" in method.flags and config.search.mask_lr is None and config.recovery.lr == 0:
        raise UsageError("--search-preset paper trains the scores with --lr, which is 0: give --mask-lr")
    search_iters = config.search.search_iters
    if method.searches:
        if train_iters == 0:
            raise UsageError(f"--method {name} searches while it trains: --train-iters must be above 0")
        if not 1 <= config.search_iters <= train_iters:
            raise UsageError(f"--search-iters {config.search_iters} is not between 1 and --train-iters {train_iters}")
    elif "search_iters" in method.flags and search_iters is not None and search_iters < 1:
        raise UsageError(f"--search-iters {search_iters} is less than 1")
    if config.heal_iters * config.search.heal_candidates > train_iters:
        raise UsageError(
            f"--heal-iters {config.heal_iters} of --heal-candidates {config.search.heal_candidates} are more than "
            f"--train-iters {train_iters}"
        )
    config.method_options()  # raises if the method's function has a parameter that is not a flag


def check_cut(config: Config) -> None:
    """Check that options that need one contiguous cut are used with a method that makes one.

    Raises:
        UsageError: names the flag.
    """
    if not config.tunes_endpoints:
        return
    if not (config.method.contiguous or config.method.names_layers):
        raise UsageError(
            f"--recovery-layers endpoints needs one contiguous cut, which --method {config.prune.method} does not make"
        )
    if config.lora.lora_rank is not None:
        raise UsageError(
            "--recovery-layers endpoints trains two layers' own weights: leave --lora-rank out, or choose all"
        )


def check_stitch(config: Config) -> None:
    """Check that the maps of `--stitch` can be fitted, and that the output can contain them.

    Raises:
        UsageError: names the flag.
    """
    obstacle = stitch_obstacle(config) if config.recovery.stitch == "fold" else None
    if obstacle:
        raise UsageError(f"--stitch fold {obstacle}")


def stitch_obstacle(config: Config) -> str | None:
    """Return why the maps of `--stitch fold` can't be fitted or exported, after the flag, or None if they can."""
    if not config.data.train_data:
        return "is fitted on calibration windows: it needs --train-data"
    if config.data.calibration_samples < 2:
        return "holds out a part of the calibration windows: --calibration-samples must be above 1"
    if config.lora.export_adapter:
        return "changes the weights below the adapters, and --export-adapter exports the source's: leave one out"
    if config.distillation.teacher == "self":
        return "changes the weights that --teacher self teaches with: use --teacher online"
    if config.method.searches and config.search.search_weights == "trained" and config.lora.lora_rank is not None:
        return (
            f"changes the weights below the adapters, and --method {config.prune.method} trains the adapters while it "
            "searches: give --search-weights frozen"
        )
    return None


def check_rounds(config: Config) -> None:
    """Check that a run can be divided into `--rounds`.

    Raises:
        UsageError: names the flag.
    """
    rounds, train_iters = config.recovery.rounds, config.recovery.train_iters or 0
    if rounds == 1:
        return
    flag, warm_up = f"--rounds {rounds}", config.recovery.lr_warmup_iters
    if config.method.names_layers:
        raise UsageError(f"{flag} selects layers in each round, and --method {config.prune.method} names them all")
    if config.lora.export_adapter:
        raise UsageError(f"{flag} merges the adapters of each round into the weights: leave --export-adapter out")
    if config.distillation.teacher == "self":
        raise UsageError(f"{flag} changes the weights that --teacher self teaches with: use --teacher online")
    shortest = train_iters // rounds
    if train_iters and shortest <= warm_up:
        raise UsageError(
            f"{flag}: a round has {shortest} of --train-iters {train_iters}, which must be more than "
            f"--lr-warmup-iters {warm_up}"
        )
    if config.method.searches and config.search_iters < rounds:
        raise UsageError(f"{flag}: --search-iters {config.search_iters} can't be shared by the rounds; give more")


def _takers(flag: str, instead: str) -> str:
    if flag in registry.SEARCH_FLAGS:
        return f"methods that search, and --method {instead} does not"
    takers = " or ".join(method.name for method in registry.methods() if flag in method.flags)
    return f"--method {takers}, not {instead}"
