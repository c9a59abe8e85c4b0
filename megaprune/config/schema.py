"""The whole configuration of a pruning run. Flags, recipes and ``--help`` all come from these dataclasses."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megaprune.config.fields import flag
from megaprune.config.mapping import fill, overridden, read_recipe
from megaprune.selection import registry
from megaprune.selection.plugins import load_modules
from megaprune.selection.registry import Method
from megaprune.utils.errors import UsageError

_LONGEST_DEFAULT_WINDOW = 4096
LARGEST_SEED = 2**32 - 1  # numpy's generators take no larger one
WHAT_TO_PRUNE = ("num_layers_to_prune", "prune_ratio", "prune_layers", "target_params")
# Of each of these one is given.
ALTERNATIVES = (WHAT_TO_PRUNE, ("hf_model", "load"))


def _methods() -> str:
    """The methods, each with its line."""
    lines = [f"{' or '.join([method.name, *method.aliases])}: {method.description}" for method in registry.methods()]
    return "how layers are chosen (docs/methods.md). " + "; ".join(lines)


@dataclass
class ModelConfig:
    """The model to prune."""

    _argument_group_name = "model"
    hf_model: str | None = flag("HF model: a folder with safetensors, or a hub id")
    load: str | None = flag("instead of --hf-model: a Megatron-Core checkpoint that convert.py import wrote")
    mtp: Literal["keep", "drop"] = flag("multi-token-prediction layers: carried along untrained, or left out", "keep")
    trust_remote_code: bool = flag("let the tokenizer run code that comes with the model", False)

    @property
    def given(self) -> str:
        """The model as the user named it."""
        return self.hf_model or self.load


@dataclass
class DataConfig:
    """Text or chat to search, recover and validate on."""

    _argument_group_name = "data"
    train_data: list[str] = flag(
        "training data: .jsonl, .jsonl.zst, .jsonl.gz, .parquet, folders of these, hub dataset ids; or preprocessed "
        ".bin/.idx prefixes, each behind its weight if they have any",
        [],
    )
    valid_data: list[str] = flag("validation data, in the same forms; its loss goes into the report", [])
    text_key: str = flag("key of the text in each row", "text")
    messages_key: str = flag("key of the chat messages in each row", "messages")
    seq_length: int | None = flag(
        "tokens in a training window (default: 4096, or the model's positions if fewer)", least=1
    )
    calibration_samples: int = flag("training windows on which layers are scored before the search", 40, least=1)
    data_cache_path: str | None = flag("where tokenised data is cached (default: SAVE/data-cache)")


@dataclass
class PruneConfig:
    """What to prune."""

    _argument_group_name = "what to prune"
    method: str = flag(_methods, "e3", choices=registry.names)
    method_module: list[str] = flag(
        "Python files or modules that register methods of your own with @megaprune.selection.register",
        [],
        loads=load_modules,
    )
    num_layers_to_prune: int | None = flag("how many layers go", least=1)
    prune_ratio: float | None = flag("share of the layers that go, rounded to whole layers", between=(0, 1))
    prune_layers: str | None = flag("with manual: the layers that go, counted from 0, as in 3,7,9")
    target_params: int | None = flag("the most parameters that the pruned model may have (without MTP layers)", least=1)


@dataclass
class SearchConfig:
    """The search for the layers that stay."""

    _argument_group_name = "search"
    search_iters: int | None = flag(
        "iterations of search within --train-iters (default: a tenth); clp's, which trains no weights, come on top"
    )
    mask_lr: float = flag("learning rate of the layer scores (Adam), falling to 0 over the search", 0.02, above=0)
    mask_init_scale: float = flag(
        "spread (standard deviation) of the scores that the search starts from", 16.0, above=0
    )
    mask_ramp: float = flag(
        "share of the search over which the number of kept layers falls to its target", 0.05, above=0, most=1
    )
    search_weights: Literal["trained", "frozen"] = flag(
        "whether the model's weights train during the search too, or stay the original ones until recovery", "trained"
    )
    gumbel_temperature: float = flag("temperature at the start of the search", 1.0, above=0)
    gumbel_anneal: float = flag("share of the temperature that is gone at the end of the search", 0.9, least=0, below=1)
    criterion: Literal["perplexity", "taylor"] = flag(
        "with shortened: the loss without each layer, or its first-order estimate from one backward pass", "perplexity"
    )
    selection_budget: int | None = flag(
        "with auto: tokens of its forward passes (default: what a search of a tenth of --train-iters costs, whose "
        "backward pass counts as two)",
        least=1,
    )
    protect_layers: str = flag("layers that are never pruned: first, last, numbers from 0, or none", "first,last")


@dataclass
class RecoveryConfig:
    """Training of what is left."""

    _argument_group_name = "recovery"
    train_iters: int | None = flag("iterations of search and recovery together; 0 changes no weight", least=0)
    lr: float = flag("peak learning rate", 1e-4, least=0)
    min_lr: float = flag("learning rate at the end", 0.0, least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = flag("decay", "cosine")
    lr_warmup_iters: int = flag("iterations of linear warm-up", 0, least=0)
    stitch: Literal["none", "linear-patch"] = flag(
        "with a contiguous cut: linear-patch maps what enters the layer behind it to what the layers that are gone "
        "made of it, and fades over the first half of recovery, for no exported model can carry it",
        "none",
    )
    recovery_layers: Literal["all", "endpoints"] | None = flag(
        "what recovery trains: all layers, or the two beside the cut of a contiguous segment (default: all; with clp, "
        "endpoints)"
    )
    micro_batch_size: int = flag("windows in one forward pass of one replica", 1, least=1)
    global_batch_size: int | None = flag("windows in one iteration (default: one micro-batch per replica)", least=1)
    clip_grad: float = flag("largest gradient norm; 0 clips nothing", 1.0, least=0)
    weight_decay: float = flag("weight decay", 0.01, least=0)
    seed: int = flag("seed of data order, noise and random choices", 1234, least=0, most=LARGEST_SEED)
    bf16: bool = flag("train in bf16 with fp32 optimizer state (default: fp32)", False)


@dataclass
class DistillationConfig:
    """Learning from the original model."""

    _argument_group_name = "distillation"
    distill_loss: Literal["adaptive", "kl", "ce"] = flag(
        "adaptive: KL on the teacher's top k, weighted by its entropy; kl: unweighted; ce: no teacher", "adaptive"
    )
    distill_tail: Literal["renormalized", "rest", "full"] = flag(
        "the tokens beyond the teacher's top k: left out, one bucket of all of them, or the student's full softmax",
        "rest",
    )
    distill_top_k: int = flag("teacher logits per token", 10, least=1)
    teacher: Literal["online", "self", "cached"] = flag(
        "online: the original model beside the student; self: with LoRA, the student's own frozen weights; cached: "
        "what cache_teacher.py stored in --teacher-logits",
        "online",
    )
    teacher_logits: str | None = flag("with --teacher cached: the folder that cache_teacher.py wrote")


@dataclass
class LoRAConfig:
    """Training adapters instead of the weights."""

    _argument_group_name = "LoRA"
    lora_rank: int | None = flag("rank of the adapters; turns LoRA on", least=1)
    lora_alpha: float | None = flag("scale of the adapters times their rank (default: twice the rank)", above=0)
    lora_target_modules: list[str] = flag(
        "Megatron's names of the linear layers that get adapters, such as linear_qkv linear_proj (default: all)", []
    )
    export_adapter: bool = flag("export the adapters in PEFT's format beside the untrained pruned model", False)


@dataclass
class ParallelConfig:
    """How the model is spread over processes."""

    _argument_group_name = "parallelism"
    tensor_model_parallel_size: int = flag("tensor-parallel ranks", 1, least=1)
    pipeline_model_parallel_size: int = flag("pipeline stages", 1, least=1)
    expert_model_parallel_size: int = flag("ranks that share out the experts of each layer", 1, least=1)
    expert_tensor_parallel_size: int | None = flag(
        "ranks that cut each expert (default: the tensor-parallel size if there are processes enough, otherwise 1)",
        least=1,
    )
    context_parallel_size: int = flag("context-parallel ranks; only 1 is supported", 1, least=1)
    sequence_parallel: bool = flag("split activations along the sequence among tensor-parallel ranks", False)
    pipeline_model_parallel_layout: str | None = flag(
        "layout of the original model's stages, as in Ettt|tttL (default: balanced); the pruned model is balanced anew"
    )


@dataclass
class EngineConfig:
    """How Megatron-Core computes."""

    _argument_group_name = "engine"
    transformer_impl: Literal["auto", "transformer_engine", "local"] = flag("layer implementation", "auto")
    use_distributed_optimizer: bool = flag("shard the optimizer's state over data-parallel ranks", False)
    recompute_granularity: Literal["selective", "full"] | None = flag("activation recomputation")


@dataclass
class RunConfig:
    """Where the run goes, and how it is watched."""

    _argument_group_name = "run"
    save: str | None = flag("run folder: the pruned model, the report, plots and checkpoints")
    save_interval: int | None = flag("iterations between checkpoints", least=1)
    exit_on_signal: bool = flag("on SIGTERM, save a checkpoint and exit", True)
    log_interval: int = flag("iterations between log lines", 10, least=1)
    tensorboard_dir: str | None = flag("TensorBoard folder (default: SAVE/tensorboard)")
    wandb_project: str | None = flag("Weights & Biases project to log to")
    max_shard_size: str = flag("largest safetensors file of the export", "5GB")
    dry_run: bool = flag("check everything, print the plan, and stop", False)


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
        """Return the run that these settings describe, checked.

        Args:
            values: settings by their flags' names, with dashes or underscores.
            origin: what errors about single settings begin with, such as the file of a recipe.

        Raises:
            UsageError: names the setting that is unknown or wrong.
        """
        from megaprune.config.checks import check_run

        config = cls(*fill(GROUPS, values, origin))
        check_run(config)
        return config

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> "Config":
        """Return the run of a YAML recipe.

        Args:
            overrides: settings that replace the recipe's; one way to name the model or the size replaces another.

        Raises:
            UsageError: the file is no recipe, or names a setting that is unknown or wrong.
        """
        recipe = read_recipe(Path(path))
        return cls.from_mapping(overridden(recipe, overrides, ALTERNATIVES), f"--config {path}: ")

    def flat(self) -> dict[str, Any]:
        """Every setting under its flag's name."""
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    def with_window(self, max_positions: int) -> "Config":
        """This run with a window's length: the user's, or the default for a model of so many positions."""
        if self.data.seq_length is not None:
            return self
        return replace(self, data=replace(self.data, seq_length=min(_LONGEST_DEFAULT_WINDOW, max_positions)))

    @property
    def calibrates(self) -> bool:
        """Whether layers are judged on windows of the training data."""
        return self.method.needs_data or self.stitches

    @property
    def reads_training_data(self) -> bool:
        """Whether any window of the training data is looked at."""
        return bool(self.recovery.train_iters) or self.calibrates

    @property
    def reads_windows(self) -> bool:
        """Whether the model sees any window at all; surgery has no use for one."""
        return self.reads_training_data or bool(self.data.valid_data)

    @property
    def method(self) -> Method:
        """The method that chooses the layers."""
        return registry.find(self.prune.method)

    def method_options(self) -> dict[str, Any]:
        """The flags that the method takes by keyword. Defaults of those that depend on the training are filled in.

        Raises:
            MegapruneError: it takes a keyword that is no flag.
        """
        listed = self.prune.prune_layers
        filled = {
            "search_iters": self.search_iters if self.method.searches else self.gradient_steps,
            "prune_layers": pruned_layers_of(listed) if listed is not None else None,
        }
        return self.method.options(self.flat() | filled)

    @property
    def distils(self) -> bool:
        """Whether the student learns from a teacher."""
        return bool(self.recovery.train_iters) and self.distillation.distill_loss != "ce"

    @property
    def tunes_endpoints(self) -> bool:
        """Whether recovery trains only the layers beside the cut."""
        return (self.recovery.recovery_layers or self.method.recovers) == "endpoints"

    @property
    def stitches(self) -> bool:
        """Whether a cut is bridged while the model heals."""
        return self.recovery.stitch != "none"

    @property
    def needs_one_cut(self) -> bool:
        """Whether what goes must be one contiguous segment."""
        return self.tunes_endpoints or self.stitches

    @property
    def gradient_steps(self) -> int:
        """Steps of a search that trains no weights."""
        return self.search.search_iters or max(30, self.tenth_of_training)

    @property
    def tenth_of_training(self) -> int:
        """Iterations of search where the user names none (E3-Pruner)."""
        return max(1, round((self.recovery.train_iters or 0) / 10))

    @property
    def search_iters(self) -> int:
        """Iterations of search: none for methods that don't search."""
        if not self.method.searches:
            return 0
        chosen = self.search.search_iters
        return self.tenth_of_training if chosen is None else chosen


def pruned_layers_of(text: str) -> list[int]:
    """``3,7,9`` as layers.

    Raises:
        UsageError: it is not a list of numbers.
    """
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--prune-layers {text!r} is not a list of layer numbers such as 3,7,9") from None


def num_layers_to_prune(config: PruneConfig, num_layers: int) -> int:
    """How many layers of a model of ``num_layers`` are to go, where the flags count layers."""
    if config.num_layers_to_prune is not None:
        return config.num_layers_to_prune
    return round(config.prune_ratio * num_layers)
