"""Frozen options of a job: everything that the code below `megaprune.pruning.resolve` knows of the configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
from megaprune.utils.files import aside_folder


@dataclass(frozen=True)
class ModelOptions:
    """The model of a job.

    Args:
        name: the folder, hub id or checkpoint as the user gave it.
        keep_mtp: whether multi-token-prediction layers are carried along.
    """

    name: str
    hf_config: HFConfig
    arch: Architecture
    keep_mtp: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class DataOptions:
    """Training and validation data, and how replicas read them.

    Args:
        cache_dir: folder of the tokenized data; None leaves it to the job.
        reads_windows: whether the model sees any window at all; reads_training: of the training data.
        calibrates: whether layers are judged on windows of the training data.
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


@dataclass(frozen=True)
class DistillationOptions:
    """The loss, and the teacher that it needs.

    Args:
        teaches: whether the student learns from a teacher at all.
        logits: folder of a cached teacher.
    """

    loss: LossKind
    tail: Tail
    top_k: int
    teacher: Literal["online", "self", "cached"]
    teaches: bool
    logits: Path | None


@dataclass(frozen=True)
class PipelineOptions:
    """Layers on each pipeline stage, balanced by what they cost.

    Args:
        original: layers of the whole model on each stage.
        layer_costs: cost of each layer of the whole model; output_cost: of what follows the last.
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
    """How the layers that stay are chosen.

    Args:
        name: the method as the user named it.
        method: its function and traits; method_options: the flags that the function takes.
        manual: the user's own choice of kept layers.
        init_scale: spread of the scores that a search starts from.
        token_budget: tokens that a method which counts them may spend.
        token_budget_given: whether the user set them, so that too few are refused.
    """

    name: str
    method: Method
    method_options: Mapping[str, Any]
    budget: Budget
    protected: frozenset[int]
    manual: list[int] | None
    calibration_samples: int
    init_scale: float
    token_budget: int
    token_budget_given: bool

    def fewest_layers(self) -> list[int]:
        """Return the layers of the shortest model that may come out."""
        return self.budget.fewest_layers(self.protected) if self.manual is None else self.manual


@dataclass(frozen=True)
class TrainingOptions:
    """Iterations of search and recovery together, and what they train.

    Args:
        trains_weights_in_search: whether the model's weights train beside the scores.
        endpoints_only: whether recovery trains only the layers beside the cut.
        stitches: whether LinearPatch bridges the cut while the model recovers.
    """

    train_iters: int
    search_iters: int
    global_batch_size: int
    seed: int
    trains_weights_in_search: bool
    endpoints_only: bool
    stitches: bool


@dataclass(frozen=True)
class OutputOptions:
    """The run folder, what is written there, and how the run is watched.

    Args:
        settings: what a run that goes on in this folder must have in common with the one that began it.
    """

    run_dir: RunDir
    settings: Mapping[str, object]
    max_shard_bytes: int
    export_adapter: bool
    save_interval: int | None
    log_interval: int
    tensorboard_dir: str | None
    wandb_project: str | None
    dry_run: bool


@dataclass(frozen=True)
class JobOptions:
    """What every job with a model in Megatron-Core is made of."""

    model: ModelOptions
    engine: EngineOptions
    pipeline: PipelineOptions
    data: DataOptions
    distillation: DistillationOptions

    @property
    def sizes(self) -> ParallelSizes:
        return self.engine.sizes


@dataclass(frozen=True)
class CachingOptions(JobOptions):
    """Caching a teacher."""

    output: Path
    dry_run: bool

    @property
    def work(self) -> RunDir:
        """The folder of unfinished work."""
        return RunDir(aside_folder(self.output))


@dataclass(frozen=True)
class PlanOptions(JobOptions):
    """A run on paper.

    Args:
        selection: None where the user leaves open what is pruned.
        trains: whether any iteration trains.
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
    """A pruning run."""

    lora: LoRAOptions | None
    optimizer: OptimizerOptions
    selection: SelectionOptions
    training: TrainingOptions
    output: OutputOptions

    @property
    def tokens_per_iteration(self) -> int:
        return self.training.global_batch_size * self.data.seq_length
