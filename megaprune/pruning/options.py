"""Frozen options of a job: the only part of the configuration that the code below `megaprune.pruning.resolve` sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaprune.data.parallel_encoder import Workers
from megaprune.distillation.losses import LossKind, Tail
from megaprune.mcore.builder import EngineOptions
from megaprune.mcore.layers.lora import LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages
from megaprune.models import Architecture, HFConfig
from megaprune.pruning.run_dir import RunDir
from megaprune.selection.budget import Budget
from megaprune.selection.registry import Method
from megaprune.utils.files import aside_of


@dataclass(frozen=True)
class ModelOptions:
    """Model of a job.

    Args:
        name: the folder, Hub id or checkpoint as the user gave it.
        keep_mtp: whether multi-token-prediction layers are copied to the output.
    """

    name: str
    hf_config: HFConfig
    arch: Architecture
    keep_mtp: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class DataOptions:
    """Training and validation data, and the way replicas read them.

    Args:
        cache_dir: folder of the tokenized data; None uses the job's default.
        reads_windows: whether the model sees any window at all; reads_training: of the training data.
        calibrates: whether layers are evaluated on windows of the training data.
        workers: the processes that tokenize.
    """

    train: list[str]
    valid: list[str]
    text_key: str
    messages_key: str
    seq_length: int
    micro_batch_size: int
    cache_dir: Path | None
    reads_windows: bool
    reads_training: bool
    calibrates: bool
    workers: Workers


@dataclass(frozen=True)
class DistillationOptions:
    """Loss, and the teacher that it needs.

    Args:
        teaches: whether the student learns from a teacher.
        logits: folder of a cached teacher.
        alpha: share of the distillation loss; the rest is cross-entropy.
        hidden_weight: factor of the loss on hidden states in recovery.
        mtp_factor: factor of the loss of MTP layers; 0 trains none.
    """

    loss: LossKind
    tail: Tail
    top_k: int
    teacher: Literal["online", "self", "cached"]
    teaches: bool
    logits: Path | None
    alpha: float
    hidden_weight: float
    mtp_factor: float


@dataclass(frozen=True)
class PipelineOptions:
    """Number of layers on each pipeline stage, balanced by cost.

    Args:
        original: layers of the whole model on each stage.
        layer_costs: cost of each layer of the whole model; output_cost: cost of the modules after the last layer.
    """

    original: tuple[int, ...]
    layer_costs: tuple[int, ...]
    output_cost: int

    def stages_of_layers(self, kept_layers: Sequence[int]) -> list[int]:
        """Return the number of layers of a pruned model on each stage."""
        costs = [self.layer_costs[layer] for layer in kept_layers]
        return balanced_stages(costs, len(self.original), self.output_cost)


@dataclass(frozen=True)
class SelectionOptions:
    """Selection of the layers that stay.

    Args:
        name: the method as the user named it.
        method: its function and traits; method_options: the flags that the function takes.
        manual: kept layers given by the user.
        token_budget: tokens that a method with `--selection-budget` may spend.
        heal_candidates: number of candidates that are trained for `heal_iters` iterations before one is chosen.
        token_budget_given: whether the user set the budget; if so, a budget that is too small is refused.
    """

    name: str
    method: Method
    method_options: Mapping[str, Any]
    budget: Budget
    protected: frozenset[int]
    manual: list[int] | None
    calibration_samples: int
    token_budget: int
    token_budget_given: bool
    heal_candidates: int = 1
    heal_iters: int = 0

    def fewest_layers(self) -> list[int]:
        """Return the layers of the shortest model that the selection may produce."""
        return self.budget.fewest_layers(self.protected) if self.manual is None else self.manual


@dataclass(frozen=True)
class TrainingOptions:
    """Iterations of search and recovery together, and the weights that they train.

    Args:
        trains_weights_in_search: whether the model's weights train together with the scores.
        endpoints_only: whether recovery trains only the layers next to the cut.
        rounds: rounds of selection and recovery that share the iterations and the layers to remove.
        first_iteration: position of the first iteration in the data, above 0 after the first round; data_iters: number
            of iterations that the data are laid out for, which are those of all rounds.
        stitches: whether maps that stand in for the removed layers are folded into the pruned model.
    """

    train_iters: int
    search_iters: int
    global_batch_size: int
    seed: int
    trains_weights_in_search: bool
    endpoints_only: bool
    stitches: bool
    rounds: int = 1
    first_iteration: int = 0
    data_iters: int = 0

    @property
    def changes_weights(self) -> bool:
        """Return whether the pruned model's weights differ from the source's."""
        return self.train_iters > 0 or self.stitches


@dataclass(frozen=True)
class OutputOptions:
    """Run folder, its contents, and the logging of the run.

    Args:
        settings: settings that must be unchanged when the run is resumed in this folder.
    """

    run_dir: RunDir
    settings: Mapping[str, object]
    max_shard_bytes: int
    export_adapter: bool
    save_interval: int | None
    async_save: bool
    log_interval: int
    peak_tflops: float | None
    tensorboard_dir: str | None
    wandb_project: str | None
    dry_run: bool


@dataclass(frozen=True)
class JobOptions:
    """Options of every job that runs a model in Megatron-Core.

    Args:
        timeout_minutes: limit of each collective operation.
    """

    model: ModelOptions
    engine: EngineOptions
    pipeline: PipelineOptions
    data: DataOptions
    distillation: DistillationOptions
    timeout_minutes: int

    @property
    def sizes(self) -> ParallelSizes:
        return self.engine.sizes


@dataclass(frozen=True)
class CachingOptions(JobOptions):
    """Options of teacher caching."""

    output: Path
    dry_run: bool

    @property
    def work(self) -> RunDir:
        """Return the folder of unfinished work."""
        return RunDir(aside_of(self.output))


@dataclass(frozen=True)
class PlanOptions(JobOptions):
    """Options of a plan, which is a run that is computed without being executed.

    Args:
        selection: None if the user does not say what is pruned.
        trains: whether there are any training iterations.
        distributed_optimizer: whether the optimizer's state is sharded over data-parallel ranks.
    """

    world_size: int
    lora: LoRAOptions | None
    global_batch_size: int
    selection: SelectionOptions | None
    trains: bool
    distributed_optimizer: bool


@dataclass(frozen=True)
class RunOptions(JobOptions):
    """Options of a pruning run."""

    lora: LoRAOptions | None
    optimizer: OptimizerOptions
    selection: SelectionOptions
    training: TrainingOptions
    output: OutputOptions

    @property
    def tokens_per_iteration(self) -> int:
        return self.training.global_batch_size * self.data.seq_length
