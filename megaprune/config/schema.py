"""The whole configuration of a pruning run. Flags, recipes and ``--help`` all come from these dataclasses."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from megaprune.cli.parser import flag, parse_groups
from megaprune.utils.errors import UsageError

SEARCHES = ("e3", "sheared")
# Methods that look at calibration data, and do not train.
CALIBRATED = ("auto", "clp", "shortgpt", "minitron", "sleb", "shortened", "evolution", "kl-init", "exhaustive")
_DESCRIPTION = "Prunes and heals a model: HF folder in, pruned HF folder out."
_LONGEST_DEFAULT_WINDOW = 4096
_LARGEST_SEED = 2**32 - 1  # numpy's generators take no larger one
WHAT_TO_PRUNE = ("num_layers_to_prune", "prune_ratio", "prune_layers", "target_params")
# Of each of these one is given.
ALTERNATIVES = (WHAT_TO_PRUNE, ("hf_model", "load"))


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
    seq_length: int | None = flag("tokens in a training window (default: 4096, or the model's positions if fewer)")
    calibration_samples: int = flag("training windows on which layers are scored before the search", 40)
    data_cache_path: str | None = flag("where tokenised data is cached (default: SAVE/data-cache)")


@dataclass
class PruneConfig:
    """What to prune."""

    _argument_group_name = "what to prune"
    method: Literal[
        "e3",
        "auto",
        "clp",
        "shortgpt",
        "minitron",
        "sheared",
        "sleb",
        "shortened",
        "evolution",
        "kl-init",
        "exhaustive",
        "random",
        "manual",
    ] = flag("how layers are chosen (docs/methods.md); random is a control, manual takes --prune-layers", "e3")
    num_layers_to_prune: int | None = flag("how many layers go")
    prune_ratio: float | None = flag("share of the layers that go, rounded to whole layers")
    prune_layers: str | None = flag("with manual: the layers that go, counted from 0, as in 3,7,9")
    target_params: int | None = flag("the most parameters that the pruned model may have (without MTP layers)")


@dataclass
class SearchConfig:
    """The search for the layers that stay."""

    _argument_group_name = "search"
    search_iters: int | None = flag(
        "iterations of search within --train-iters (default: a tenth); clp's, which trains no weights, come on top"
    )
    mask_lr: float = flag("learning rate of the layer scores (Adam), falling to 0 over the search", 0.02)
    mask_init_scale: float = flag("spread (standard deviation) of the scores that the search starts from", 16.0)
    mask_ramp: float = flag("share of the search over which the number of kept layers falls to its target", 0.05)
    search_weights: Literal["trained", "frozen"] = flag(
        "whether the model's weights train during the search too, or stay the original ones until recovery", "trained"
    )
    mask_noise: Literal["shared", "replica"] = flag(
        "whether all data-parallel replicas try the same mask in a step, or each one of its own, and the scores' "
        "gradients are averaged",
        "shared",
    )
    gumbel_temperature: float = flag("temperature at the start of the search", 1.0)
    gumbel_anneal: float = flag("share of the temperature that is gone at the end of the search", 0.9)
    criterion: Literal["perplexity", "taylor"] = flag(
        "with shortened: the loss without each layer, or its first-order estimate from one backward pass", "perplexity"
    )
    selection_budget: int | None = flag(
        "with auto: tokens of its forward passes (default: what a search of a tenth of --train-iters costs, whose "
        "backward pass counts as two)"
    )
    protect_layers: str = flag("layers that are never pruned: first, last, numbers from 0, or none", "first,last")


@dataclass
class RecoveryConfig:
    """Training of what is left."""

    _argument_group_name = "recovery"
    train_iters: int | None = flag("iterations of search and recovery together; 0 changes no weight")
    lr: float = flag("peak learning rate", 1e-4)
    min_lr: float = flag("learning rate at the end", 0.0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = flag("decay", "cosine")
    lr_warmup_iters: int = flag("iterations of linear warm-up", 0)
    stitch: Literal["none", "linear-patch"] = flag(
        "with a contiguous cut: linear-patch maps what enters the layer behind it to what the layers that are gone "
        "made of it, and fades over the first half of recovery, for no exported model can carry it",
        "none",
    )
    recovery_layers: Literal["all", "endpoints"] | None = flag(
        "what recovery trains: all layers, or the two beside the cut of a contiguous segment (default: all; with clp, "
        "endpoints)"
    )
    micro_batch_size: int = flag("windows in one forward pass of one replica", 1)
    global_batch_size: int | None = flag("windows in one iteration (default: one micro-batch per replica)")
    clip_grad: float = flag("largest gradient norm; 0 clips nothing", 1.0)
    weight_decay: float = flag("weight decay", 0.01)
    seed: int = flag("seed of data order, noise and random choices", 1234)
    bf16: bool = flag("train in bf16 with fp32 optimizer state (default: fp32)", False)


@dataclass
class DistillationConfig:
    """Learning from the original model."""

    _argument_group_name = "distillation"
    distill_loss: Literal["adaptive", "kl", "ce"] = flag(
        "adaptive: KL on the teacher's top k, weighted by its entropy; kl: unweighted; ce: no teacher", "adaptive"
    )
    distill_tail: Literal["renormalised", "rest", "full"] = flag(
        "the tokens beyond the teacher's top k: left out, one bucket of all of them, or the student's full softmax",
        "rest",
    )
    distill_top_k: int = flag("teacher logits per token", 10)
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
    lora_rank: int | None = flag("rank of the adapters; turns LoRA on")
    lora_alpha: float | None = flag("scale of the adapters times their rank (default: twice the rank)")
    lora_target_modules: list[str] = flag(
        "Megatron's names of the linear layers that get adapters, such as linear_qkv linear_proj (default: all)", []
    )
    export_adapter: bool = flag("export the adapters in PEFT's format beside the untrained pruned model", False)


@dataclass
class ParallelConfig:
    """How the model is spread over processes."""

    _argument_group_name = "parallelism"
    tensor_model_parallel_size: int = flag("tensor-parallel ranks", 1)
    pipeline_model_parallel_size: int = flag("pipeline stages", 1)
    expert_model_parallel_size: int = flag("ranks that share out the experts of each layer", 1)
    expert_tensor_parallel_size: int | None = flag(
        "ranks that cut each expert (default: the tensor-parallel size if there are processes enough, otherwise 1)"
    )
    context_parallel_size: int = flag("context-parallel ranks; only 1 is supported", 1)
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
    save_interval: int | None = flag("iterations between checkpoints")
    exit_on_signal: bool = flag("on SIGTERM, save a checkpoint and exit", True)
    log_interval: int = flag("iterations between log lines", 10)
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
        return self.prune.method in ("e3", *CALIBRATED) or self.stitches

    @property
    def reads_training_data(self) -> bool:
        """Whether any window of the training data is looked at."""
        return bool(self.recovery.train_iters) or self.calibrates

    @property
    def reads_windows(self) -> bool:
        """Whether the model sees any window at all; surgery has no use for one."""
        return self.reads_training_data or bool(self.data.valid_data)

    @property
    def distils(self) -> bool:
        """Whether the student learns from a teacher."""
        return bool(self.recovery.train_iters) and self.distillation.distill_loss != "ce"

    @property
    def tunes_endpoints(self) -> bool:
        """Whether recovery trains only the layers beside the cut."""
        chosen = self.recovery.recovery_layers
        return self.prune.method == "clp" if chosen is None else chosen == "endpoints"

    @property
    def own_masks(self) -> bool:
        """Whether each replica tries a mask of its own in the search."""
        return self.search.mask_noise == "replica"

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
        if self.prune.method not in SEARCHES:
            return 0
        chosen = self.search.search_iters
        return self.tenth_of_training if chosen is None else chosen


def parse_config(argv: Sequence[str], prog: str = "prune.py") -> Config:
    """The run that a command line asks for.

    Raises:
        UsageError: a flag or a recipe is wrong; names it.
    """
    config = Config(*parse_groups(argv, GROUPS, prog, _DESCRIPTION, ALTERNATIVES))
    _check(config)
    return config


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


def _check(config: Config) -> None:
    """Everything that can be known before the model and the data are looked at."""
    _check_model(config.model)
    if not config.run.save:
        raise UsageError("--save is required")
    _check_what_to_prune(config.prune)
    if config.recovery.train_iters is None:
        raise UsageError("--train-iters is required (0 removes layers and changes no weight)")
    _check_ranges(config)
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
    _check_ranges(config)
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
    _check_ranges(config)


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
    if prune.prune_ratio is not None and not 0 < prune.prune_ratio < 1:
        raise UsageError(f"--prune-ratio {prune.prune_ratio} is not between 0 and 1")
    if prune.num_layers_to_prune is not None and prune.num_layers_to_prune < 1:
        raise UsageError(f"--num-layers-to-prune {prune.num_layers_to_prune} is less than 1")


def _check_ranges(config: Config) -> None:
    at_least_1 = (
        *("target_params", "selection_budget"),
        *("seq_length", "calibration_samples", "micro_batch_size", "global_batch_size", "distill_top_k"),
        *("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"),
        *("expert_model_parallel_size", "expert_tensor_parallel_size", "lora_rank"),
        *("save_interval", "log_interval"),
    )
    at_least_0 = ("train_iters", "lr", "min_lr", "lr_warmup_iters", "clip_grad", "weight_decay", "seed")
    values = {name: value for name, value in config.flat().items() if value is not None}
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{flag} {value} is not a finite number")
        least = 1 if name in at_least_1 else 0 if name in at_least_0 else None
        if least is not None and value < least:
            raise UsageError(f"{flag} {value} is less than {least}")
    for name in ("mask_lr", "gumbel_temperature", "mask_init_scale", "mask_ramp"):
        if values[name] <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {values[name]} is not above 0")
    if config.search.mask_ramp > 1:
        raise UsageError(f"--mask-ramp {config.search.mask_ramp} is above 1")
    if not 0 <= config.search.gumbel_anneal < 1:
        raise UsageError(f"--gumbel-anneal {config.search.gumbel_anneal} is not between 0 and 1")
    if config.recovery.seed > _LARGEST_SEED:
        raise UsageError(f"--seed {config.recovery.seed} is above {_LARGEST_SEED}")


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
    if config.lora.lora_alpha is not None and config.lora.lora_alpha <= 0:
        raise UsageError(f"--lora-alpha {config.lora.lora_alpha} is not above 0")


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
