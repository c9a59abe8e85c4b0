"""The configuration of a pruning run. Flags, recipes and ``--help`` are derived from these dataclasses."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megaprune.config.engine import EngineConfig, LoRAConfig, ParallelConfig
from megaprune.config.fields import flag
from megaprune.config.mapping import fill, overridden, read_recipe
from megaprune.config.sizes import pruned_layers_of
from megaprune.config.training import DistillationConfig, RecoveryConfig
from megaprune.selection import registry
from megaprune.selection.plugins import load_modules
from megaprune.selection.registry import Method

_LONGEST_DEFAULT_WINDOW = 4096
WHAT_TO_PRUNE = (
    *("num_layers_to_prune", "prune_ratio", "prune_layers", "target_params", "target_active_params"),
    "target_memory",
)
# Groups of settings of which exactly one is given.
ALTERNATIVES = (WHAT_TO_PRUNE, ("hf_model", "load"))


def _methods() -> str:
    """Return the help text of `--method`: each method with its description."""
    lines = [f"{' or '.join([method.name, *method.aliases])}: {method.description}" for method in registry.methods()]
    return "how the layers to remove are selected (docs/methods.md). " + "; ".join(lines)


@dataclass
class ModelConfig:
    """The model to prune."""

    _argument_group_name = "model"
    hf_model: str | None = flag("HF model: a folder with safetensors files, or a hub id")
    load: str | None = flag("Megatron-Core checkpoint written by `megaprune convert import`, instead of --hf-model")
    mtp: Literal["keep", "drop"] = flag(
        "multi-token-prediction layers: copied to the output (see --mtp-loss-scaling-factor), or dropped", "keep"
    )
    trust_remote_code: bool = flag("run the tokenizer code that comes with the model", False)

    @property
    def given(self) -> str:
        """The model as named by the user; empty before the checks if it was not named."""
        return self.hf_model or self.load or ""


@dataclass
class DataConfig:
    """Data for search, recovery and validation."""

    _argument_group_name = "data"
    train_data: list[str] = flag(
        "training data: .jsonl, .jsonl.zst, .jsonl.gz or .parquet files, folders of these, or hub dataset ids; or "
        "prefixes of preprocessed .bin/.idx files, optionally each preceded by a weight",
        [],
    )
    valid_data: list[str] = flag(
        "validation data, in the same formats but without weights; the report contains its loss", []
    )
    text_key: str = flag("key of the text in each row", "text")
    messages_key: str = flag("key of the chat messages in each row", "messages")
    seq_length: int | None = flag(
        "tokens in a training window (default: 4096, or the model's maximum if it is smaller)", least=1
    )
    calibration_samples: int = flag("number of training windows on which layers are scored", 40, least=1)
    tokenizer_workers: int | None = flag(
        "number of processes that tokenize text and chats; it does not change the tokens (default: one per available "
        "core, at most 32, and none for less than about 24 MB)",
        least=1,
    )
    data_cache_path: str | None = flag("folder for tokenized data and index files (default: SAVE/data-cache)")


@dataclass
class PruneConfig:
    """The layers to prune: the method and the size of the pruned model."""

    _argument_group_name = "what to prune"
    method: str = flag(_methods, "e3", choices=registry.names)
    method_module: list[str] = flag(
        "Python files or modules that register methods of your own with @megaprune.selection.register",
        [],
        loads=load_modules,
    )
    num_layers_to_prune: int | None = flag("number of layers to remove", least=1)
    prune_ratio: float | None = flag(
        "fraction of the layers to remove, rounded to a whole number of layers", between=(0, 1)
    )
    prune_layers: str | None = flag("with --method manual: the layers to remove, counted from 0, such as 3,7,9")
    target_params: int | None = flag("maximum number of parameters of the pruned model, without MTP layers", least=1)
    target_active_params: int | None = flag(
        "maximum number of parameters that a token passes through in the pruned model: of the routed experts, only the "
        "chosen ones",
        least=1,
    )
    target_memory: str | None = flag(
        "maximum memory of the served model, such as 24GB: its weights, and its KV cache for "
        "--target-memory-batch-size sequences of --target-memory-seq-length tokens"
    )
    target_memory_batch_size: int = flag("with --target-memory: sequences in the KV cache", 1, least=1)
    target_memory_seq_length: int | None = flag(
        "with --target-memory: tokens of each sequence (default: --seq-length)", least=1
    )


@dataclass
class SearchConfig:
    """The search for the layers to keep."""

    _argument_group_name = "search"
    search_iters: int | None = flag(
        "search iterations, part of --train-iters (default: a tenth of it); with --method clp, which trains no "
        "weights, in addition to --train-iters"
    )
    search_preset: Literal["measured", "paper"] = flag(
        "search of --method e3. measured: the value of each layer beside the others, from half-open gates in single "
        "windows; paper: scores trained by Adam through the relaxed mask, as in the text of E3-Pruner",
        "measured",
    )
    mask_lr: float | None = flag(
        "with --search-preset paper: learning rate of the layer scores (default: --lr)", above=0
    )
    mask_init_scale: float | None = flag(
        "with --search-preset paper: standardize the logarithms of the initial scores to this standard deviation "
        "(default: the KLs themselves)",
        above=0,
    )
    mask_ramp: float | None = flag(
        "fraction of the search during which the number of kept layers decreases to the target (default: 0.5; with "
        "--search-preset paper, 1)",
        above=0,
        most=1,
    )
    search_weights: Literal["trained", "frozen"] = flag(
        "whether the model's weights are trained during the search, or stay unchanged until recovery", "trained"
    )
    gumbel_temperature: float = flag("Gumbel-TopK temperature at the start of the search", 1.0, above=0)
    gumbel_anneal: float = flag(
        "fraction by which the temperature has decreased at the end of the search", 0.9, least=0, below=1
    )
    criterion: Literal["perplexity", "taylor"] = flag(
        "with --method shortened: the loss without each layer, or its first-order estimate from one backward pass",
        "perplexity",
    )
    selection_budget: int | None = flag(
        "with --method auto or quadratic: maximum number of tokens in their forward passes (default: the cost of a "
        "search of a tenth of --train-iters, in which a backward pass counts as two forward passes)",
        least=1,
    )
    heal_candidates: int = flag(
        "with --method auto: number of candidates that recovery begins with; after --heal-iters iterations of each, "
        "the best one goes on. All of them are part of --train-iters. 1 chooses by KL alone",
        1,
        least=1,
    )
    heal_iters: int | None = flag(
        "with --heal-candidates: iterations of each candidate (default: a twentieth of --train-iters)", least=0
    )
    protect_layers: str = flag(
        "layers that are never removed, separated by commas: first, last, numbers from 0; or none", "first,last"
    )


@dataclass
class RunConfig:
    """Output and monitoring of a run."""

    _argument_group_name = "run"
    save: str | None = flag("run folder, which gets the pruned model, the report, plots and checkpoints")
    save_interval: int | None = flag("iterations between checkpoints", least=1)
    async_save: bool = flag(
        "write the checkpoints of --save-interval in the background, while training goes on; one counts once every "
        "rank has written its part",
        False,
    )
    exit_on_signal: bool = flag("save all progress and exit on SIGTERM or SIGUSR1, in any stage", True)
    exit_duration_in_mins: float | None = flag(
        "save all progress and exit, so that the run has ended after this many minutes", above=0
    )
    log_interval: int = flag("iterations between two log lines", 10, least=1)
    peak_tflops: float | None = flag(
        "peak of one device in TFLOP/s, for the share of it that is used (default: known for NVIDIA's data center GPUs "
        "in bf16)",
        above=0,
    )
    tensorboard_dir: str | None = flag("folder for TensorBoard (default: SAVE/tensorboard)")
    wandb_project: str | None = flag("Weights & Biases project that gets the metrics")
    max_shard_size: str = flag("maximum size of a safetensors file of the exported model", "5GB")
    dry_run: bool = flag("check the command and print the plan, without running it", False)


GROUPS = (
    ModelConfig,
    DataConfig,
    PruneConfig,
    SearchConfig,
    RecoveryConfig,
    DistillationConfig,
    LoRAConfig,
    ParallelConfig,
    EngineConfig,
    RunConfig,
)


@dataclass
class Config:
    """A pruning run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], origin: str = "") -> "Config":
        """Return the checked configuration that these settings describe.

        Args:
            values: settings by their flags' names, with dashes or underscores.
            origin: prefix of errors about single settings, such as the file of a recipe.

        Raises:
            UsageError: a setting is unknown or wrong; names it.
        """
        from megaprune.config.checks import check_run

        config = cls(*fill(GROUPS, values, origin))
        check_run(config)
        return config

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Config":
        """Return the checked configuration of a YAML recipe.

        Args:
            overrides: settings that replace the recipe's. A setting of the model or the size replaces its alternatives
                too, for instance `prune_ratio` the recipe's `num_layers_to_prune`.

        Raises:
            UsageError: the file is not a recipe, or a setting is unknown or wrong.
        """
        recipe = read_recipe(Path(path))
        return cls.from_mapping(overridden(recipe, overrides, ALTERNATIVES), f"--config {path}: ")

    def flat(self) -> dict[str, Any]:
        """Return every setting by its name."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def changed(self) -> dict[str, Any]:
        """Return the settings that differ from their defaults, by name."""
        defaults = Config().flat()
        return {name: value for name, value in self.flat().items() if value != defaults[name]}

    def with_window(self, max_positions: int) -> "Config":
        """Return this configuration with `seq_length` set, by default for a model of so many positions."""
        if self.data.seq_length is not None:
            return self
        return replace(self, data=replace(self.data, seq_length=min(_LONGEST_DEFAULT_WINDOW, max_positions)))

    @property
    def calibrates(self) -> bool:
        """True if layers are scored on windows of the training data."""
        return self.method.needs_data or self.stitches

    @property
    def reads_training_data(self) -> bool:
        """True if the run reads any window of the training data."""
        return bool(self.recovery.train_iters) or self.calibrates

    @property
    def reads_windows(self) -> bool:
        """True if the run reads any window; pure removal of layers reads none."""
        return self.reads_training_data or bool(self.data.valid_data)

    @property
    def method(self) -> Method:
        """The method that selects the layers."""
        return registry.find(self.prune.method)

    def method_options(self) -> dict[str, Any]:
        """Return the keyword arguments of the method, with defaults that depend on the training filled in.

        Raises:
            MegapruneError: it takes a keyword that is not a flag.
        """
        listed = self.prune.prune_layers
        filled = {
            "search_iters": self.search_iters if self.method.searches else self.gradient_steps,
            "prune_layers": pruned_layers_of(listed) if listed is not None else None,
        }
        return self.method.options(self.flat() | filled)

    @property
    def distills(self) -> bool:
        """True if the student is trained against a teacher."""
        return bool(self.recovery.train_iters) and self.distillation.distill_loss != "ce"

    @property
    def tunes_endpoints(self) -> bool:
        """True if recovery trains only the layers next to the cut."""
        return (self.recovery.recovery_layers or self.method.recovers) == "endpoints"

    @property
    def stitches(self) -> bool:
        """True if maps that stand in for the removed layers are folded into the pruned model."""
        from megaprune.config.method_checks import stitch_obstacle

        if self.recovery.stitch is not None:
            return self.recovery.stitch != "none"
        trains = bool(self.recovery.train_iters) and self.search.search_preset != "paper"
        return trains and stitch_obstacle(self) is None

    @property
    def kd_share(self) -> float:
        """Factor of the distillation loss; the rest is the factor of cross-entropy with the data."""
        given = self.distillation.kd_loss_alpha
        if given is not None:
            return given
        return 1.0 if self.distillation.distill_loss == "ce" or self.search.search_preset == "paper" else 0.5

    @property
    def gradient_steps(self) -> int:
        """Number of steps of a search that trains no weights."""
        return self.search.search_iters or max(30, self.tenth_of_training)

    @property
    def tenth_of_training(self) -> int:
        """Default number of search iterations (E3-Pruner)."""
        return max(1, round((self.recovery.train_iters or 0) / 10))

    @property
    def heal_iters(self) -> int:
        """Number of iterations of each candidate before one is chosen; 0 if one is chosen without training."""
        if not self.method.heals or self.search.heal_candidates == 1:
            return 0
        train_iters, chosen = self.recovery.train_iters or 0, self.search.heal_iters
        return round(train_iters / 20) if chosen is None else chosen

    @property
    def search_iters(self) -> int:
        """Number of search iterations; 0 for methods that do not search."""
        if not self.method.searches:
            return 0
        chosen = self.search.search_iters
        return self.tenth_of_training if chosen is None else chosen
