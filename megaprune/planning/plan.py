"""Planning: the layers, memory and cost of every rank of a cluster, computed from config.json and the flags."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from megaprune.config.schema import Config
from megaprune.importance.evaluator import WINDOWS_OF_A_STEP
from megaprune.mcore.layers.lora import LoRAOptions
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.simulation import Share, SimulatedCluster
from megaprune.models import HFConfig, family_of
from megaprune.models.sizes import Size, layer_sizes, model_size
from megaprune.planning.activations import Activations, Passes
from megaprune.planning.memory import (
    Memory,
    TrainingState,
    forward_memory,
    importance_memory,
    micro_batches_in_flight,
    resting_memory,
    training_memory,
    with_margin,
)
from megaprune.pruning.options import SelectionOptions
from megaprune.pruning.resolve import resolve_plan
from megaprune.selection.one_shot import top_layers
from megaprune.utils.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """One pipeline stage. All its ranks have the same sizes.

    Args:
        layers: layers of the source on this stage.
        running_layers: those of them that are active.
        dense_layers: number of active layers without experts.
        moe_layers: number of active layers with experts.
        parameters: parameters per rank.
        trained_parameters: trained parameters per rank; those of the adapters with LoRA, 0 without training.
        cost: multiply-adds of the weights per token, over all ranks of the stage.
        memory: memory per rank.
    """

    first_rank: int
    last_rank: int
    layers: list[int]
    running_layers: list[int]
    dense_layers: int
    moe_layers: int
    parameters: int
    trained_parameters: int
    cost: int
    memory: Memory


@dataclass(frozen=True)
class Phase:
    """A part of a run during which the contents of the ranks do not change.

    Args:
        kept_layers: layers of the source in the model.
        assumed: the assumption about these layers if they are not known yet.
        size: parameters of the whole model.
    """

    name: str
    kept_layers: list[int]
    assumed: str | None
    size: Size
    stages: list[Stage]

    @property
    def imbalance(self) -> float:
        """The cost of the most expensive stage, divided by the mean cost of the stages."""
        costs = [stage.cost for stage in self.stages]
        return max(costs) * len(costs) / sum(costs)


@dataclass(frozen=True)
class Moment:
    """A part of a run between or within its phases, with the memory of a rank of each pipeline stage."""

    name: str
    memory: list[Memory]


@dataclass(frozen=True)
class Disk:
    """Space that a run's checkpoints need.

    Args:
        checkpoint: bytes of one checkpoint of the pruned student.
        at_once: checkpoints that exist at the same time: an old and a new one, and those of candidates.
    """

    checkpoint: int
    at_once: int


@dataclass(frozen=True)
class Cluster:
    """Division of the processes into groups, and the batch of an iteration."""

    world_size: int
    sizes: ParallelSizes
    micro_batch_size: int
    global_batch_size: int
    seq_length: int

    @property
    def data_parallel(self) -> int:
        """Number of data-parallel replicas."""
        return self.world_size // self.sizes.model

    @property
    def expert_data_parallel(self) -> int:
        """Number of data-parallel replicas of each routed expert."""
        return self.world_size // (self.sizes.pipeline * self.sizes.expert * self.sizes.expert_tensor)

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of one replica in an iteration."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel)

    @property
    def tokens_per_iteration(self) -> int:
        """Tokens of a global batch."""
        return self.global_batch_size * self.seq_length

    @property
    def groups(self) -> int:
        """Number of groups of several ranks that a rank is in: the whole cluster, and one of each parallelism."""
        sizes = self.sizes
        found = (self.world_size, sizes.tensor, sizes.pipeline, sizes.context, self.data_parallel)
        experts = (sizes.expert, sizes.expert_tensor, self.expert_data_parallel)
        has_experts = sizes.expert * sizes.expert_tensor > 1
        return sum(size > 1 for size in (*found, *(experts if has_experts else ())))

    @property
    def bubble(self) -> float:
        """Fraction of an iteration's time in which a stage of a balanced pipeline is idle."""
        waiting = self.sizes.pipeline - 1
        return waiting / (self.micro_batches + waiting)


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    config: Config
    model_type: str
    cluster: Cluster
    lora: LoRAOptions | None
    teacher: str | None
    phases: list[Phase]
    moments: list[Moment]
    disk: Disk | None


def make_plan(config: Config, hf_config: HFConfig, world_size: int) -> Plan:
    """Plan a run on this many processes.

    Raises:
        MegapruneError: the model can't be expressed.
        UsageError: the flags don't fit each other, the model or the processes.
    """
    return _Planner(config, hf_config, world_size).plan()


def planned_mtp(hf_config: HFConfig) -> int:
    """Return the number of MTP layers that config.json gives.

    Raises:
        UsageError: there are none, so that none can be trained.
    """
    found = next((hf_config[key] for key in family_of(hf_config).mtp_keys if hf_config.get(key) is not None), 0)
    if not found:
        raise UsageError("--mtp-loss-scaling-factor: the model has no multi-token-prediction layers; leave it out")
    return int(found)


class _Planner:
    def __init__(self, config: Config, hf_config: HFConfig, world_size: int) -> None:
        self._config, self._hf_config = config, hf_config
        options = self._options = resolve_plan(config, hf_config, world_size)
        self._arch, self._sizes, self._lora = options.model.arch, options.sizes, options.lora
        if options.trains and options.distillation.mtp_factor:
            self._arch = replace(self._arch, num_mtp=planned_mtp(hf_config))
        data = options.data
        self._cluster = Cluster(
            world_size, self._sizes, data.micro_batch_size, options.global_batch_size, data.seq_length
        )
        self._paper = SimulatedCluster(replace(options.engine, recompute_granularity=None), world_size, self._lora)
        self._layer_sizes = layer_sizes(hf_config)
        self._activations = Activations(self._arch, self._passes())
        shards = (self._cluster.data_parallel, self._cluster.expert_data_parallel)
        self._state = TrainingState(options.engine.bf16, *(shards if options.distributed_optimizer else (1, 1)))
        self._recovery = replace(self._state, averages=bool(config.recovery.average_weights))
        taught = options.trains and options.distillation.loss != "ce"
        self._teacher = options.distillation.teacher if taught else None
        self._compares_states = taught and options.distillation.hidden_weight > 0

    def _passes(self) -> Passes:
        engine, sizes = self._options.engine, self._sizes
        return Passes(
            self._options.data.micro_batch_size,
            engine.seq_length,
            bf16=engine.bf16,
            tensor=sizes.tensor,
            expert_tensor=sizes.expert_tensor,
            sequence_parallel=sizes.sequence_parallel,
            recompute=engine.recompute_granularity,
            adapter_rank=self._lora.rank if self._lora else None,
            adapter_targets=self._lora.targets if self._lora else (),
        )

    def plan(self) -> Plan:
        phases = self._phases()
        return Plan(
            self._config,
            self._hf_config["model_type"],
            self._cluster,
            self._lora,
            self._teacher,
            phases,
            self._moments(phases[-1]),
            self._disk(phases[-1]) if self._options.trains else None,
        )

    def _phases(self) -> list[Phase]:
        every, selection = list(range(self._arch.num_layers)), self._options.selection
        if selection is None:
            return [self._phase("training", every, None)]
        searching = selection.method.searches
        first = self._phase("search", every, None) if searching else self._phase("original", every, None, False)
        kept, assumed = self._kept_layers(selection)
        return [first, self._phase("recovery", kept, assumed)]

    def _kept_layers(self, selection: SelectionOptions) -> tuple[list[int], str | None]:
        """Return the kept layers, and the assumption about them if only a run can determine them."""
        if selection.manual is not None:
            return selection.manual, None
        sizes = torch.tensor([size.total for size in self._layer_sizes], dtype=torch.float64)
        assumed = "the layers with the fewest parameters are removed, the last ones if sizes are equal"
        if self._teacher == "self":
            assumed += "; activations are those of stages without removed layers"
        return top_layers(sizes, selection.budget, selection.protected), assumed

    def _phase(self, name: str, kept: Sequence[int], assumed: str | None, trained: bool = True) -> Phase:
        stays_whole = self._teacher == "self"
        built = list(range(self._arch.num_layers)) if stays_whole else list(kept)
        counts, shares, teachers = self._built(kept)
        stages, first = [], 0
        for number, (count, share, teacher) in enumerate(zip(counts, shares, teachers, strict=True)):
            layers = built[first : first + count]
            first += count
            running = [layer for layer in layers if layer in set(kept)]
            # A stage that keeps its pruned layers may turn out to lose none of them.
            active = layers if stays_whole and assumed else running
            last = number == len(counts) - 1
            if trained and self._options.trains:
                compared = self._compares_states and name == "recovery"
                state = self._state if name == "search" else self._recovery
                memory = self._training_memory(
                    share, state, teacher, number, active, last, len(running) if compared else 0
                )
            else:
                memory = forward_memory(share, self._activations, last)
            stages.append(self._stage(number, layers, running, share, memory))
        return Phase(name, list(kept), assumed, model_size(self._hf_config, kept), stages)

    def _built(self, kept: Sequence[int]) -> tuple[list[int], list[Share], list[Share] | list[None]]:
        """Return the number of layers on each stage of the student that keeps these layers, and the shares of the
        student and of a separate teacher.
        """
        original, whole = list(range(self._arch.num_layers)), list(self._options.pipeline.original)
        built = original if self._teacher == "self" else list(kept)
        counts = whole if len(built) == len(original) else self._options.pipeline.stages_of_layers(kept)
        shares = self._paper.shares(self._arch.pruned(built), counts)
        if self._teacher != "online":
            return counts, shares, [None] * len(whole)
        return counts, shares, self._paper.shares(replace(self._arch, num_mtp=0), whole)

    def _moments(self, recovery: Phase) -> list[Moment]:
        """Return the importance passes, the construction of the pruned student, and the saving of a checkpoint."""
        selection, found = self._options.selection, []
        if selection is not None and selection.method.needs_data:
            found.append(Moment("importance", self._importance(selection)))
        if self._options.trains:
            _, shares, teachers = self._built(recovery.kept_layers)
            resting = [
                self._with_margin(resting_memory(share, self._recovery, teacher.model_bytes if teacher else 0))
                for share, teacher in zip(shares, teachers, strict=True)
            ]
            if selection is not None and self._teacher != "self":
                found.append(Moment("transition", resting))
            found.append(Moment("saving", resting))
        return found

    def _importance(self, selection: SelectionOptions) -> list[Memory]:
        whole, first, memories = list(self._options.pipeline.original), 0, []
        gradients = selection.method.gradients and selection.method.gradients(selection.method_options)
        windows = selection.calibration_samples if gradients == "weights" else WINDOWS_OF_A_STEP
        batches = -(-windows // (self._cluster.data_parallel * self._cluster.micro_batch_size))
        for stage, (count, share) in enumerate(zip(whole, self._paper.shares(self._arch, whole), strict=True)):
            kinds = [self._arch.is_moe(layer) for layer in range(first, first + count)]
            first += count
            in_flight, last = micro_batches_in_flight(stage, len(whole), batches), stage == len(whole) - 1
            memory = importance_memory(share, self._activations, kinds, last, gradients, batches, in_flight)
            memories.append(self._with_margin(memory))
        return memories

    def _disk(self, recovery: Phase) -> Disk:
        """Return the space of checkpoints of the trained parameters, which all ranks of a stage write together."""
        sizes, selection = self._sizes, self._options.selection
        trained = sum(
            share.trained * sizes.tensor + share.trained_experts * sizes.expert * sizes.expert_tensor
            for share in self._built(recovery.kept_layers)[1]
        )
        healed = selection is not None and selection.method.heals and selection.heal_iters > 0
        candidates = selection.heal_candidates if selection is not None and healed else 1
        return Disk(trained * self._recovery.saved_bytes(), candidates + 1)

    def _with_margin(self, memory: Memory) -> Memory:
        return with_margin(memory, self._cluster.groups)

    def _stage(self, number: int, layers: list[int], running: list[int], share: Share, memory: Memory) -> Stage:
        moe = sum(self._arch.is_moe(layer) for layer in running)
        ranks = self._cluster.world_size // self._sizes.pipeline
        pipeline, last = self._options.pipeline, number == self._sizes.pipeline - 1
        return Stage(
            first_rank=number * ranks,
            last_rank=(number + 1) * ranks - 1,
            layers=layers,
            running_layers=running,
            dense_layers=len(running) - moe,
            moe_layers=moe,
            parameters=share.parameters,
            trained_parameters=share.trained + share.trained_experts if memory.gradients else 0,
            cost=sum(pipeline.layer_costs[layer] for layer in running) + (pipeline.output_cost if last else 0),
            memory=self._with_margin(memory),
        )

    def _training_memory(
        self,
        share: Share,
        state: TrainingState,
        teacher: Share | None,
        stage: int,
        layers: Sequence[int],
        last: bool,
        compared: int,
    ) -> Memory:
        ahead = self._arch.num_mtp * self._activations.multi_token(self._arch.num_experts > 0) if last else 0
        return training_memory(
            share,
            state,
            self._activations,
            [self._arch.is_moe(layer) for layer in layers],
            micro_batches_in_flight(stage, self._sizes.pipeline, self._cluster.micro_batches),
            last,
            teacher_bytes=teacher.model_bytes if teacher else 0,
            taught=self._teacher in ("online", "self"),
            target_bytes=self._target_bytes(),
            hidden_bytes=self._activations.hidden_states(compared, self._cluster.micro_batches) + ahead,
        )

    def _target_bytes(self) -> int:
        """Return the bytes of the teacher's top-k indices, logits, log-sum-exps and entropies in an iteration."""
        if self._teacher is None:
            return 0
        tokens = self._cluster.micro_batches * self._cluster.micro_batch_size * self._cluster.seq_length
        return tokens * (self._options.distillation.top_k * (8 + 4) + 4 + 4)
