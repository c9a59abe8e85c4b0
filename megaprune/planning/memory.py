"""The memory of one rank in training, part by part."""

from collections.abc import Sequence
from dataclasses import dataclass

from megaprune.mcore.simulation import Share
from megaprune.planning.activations import Activations

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of a pipeline stage.

    Args:
        weights: of the model in training, its adapters among them.
        gradients: Megatron's fp32 buffers.
        optimizer: Adam's two moments, and in bf16 the fp32 copies of the weights.
        teacher: weights of a frozen copy of the original.
        activations: what all micro-batches in flight keep for the backward pass.
        working: the most that a pass needs on top.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations + self.working


@dataclass(frozen=True)
class TrainingState:
    """How gradients and optimizer state are kept.

    Args:
        shards: ranks that share out the optimizer's state of a parameter; expert_shards: of a routed expert's. 1
            without the distributed optimizer.
    """

    bf16: bool
    shards: int = 1
    expert_shards: int = 1

    def gradient_bytes(self, share: Share) -> int:
        """Bytes of a rank's gradients."""
        return _FP32 * (share.trained + share.trained_experts)

    def optimizer_bytes(self, share: Share) -> int:
        """Bytes of a rank's optimizer state."""
        per_parameter = _FP32 * (3 if self.bf16 else 2)
        return round(per_parameter * (share.trained / self.shards + share.trained_experts / self.expert_shards))


def micro_batches_in_flight(stage: int, num_stages: int, num_micro_batches: int) -> int:
    """How many micro-batches' activations a stage holds at once under Megatron's 1F1B schedule."""
    return min(num_stages - stage, num_micro_batches)


def training_memory(
    share: Share,
    state: TrainingState,
    activations: Activations,
    moe_layers: Sequence[bool],
    in_flight: int,
    last_stage: bool,
    teacher_bytes: int = 0,
    taught: bool = False,
    target_bytes: int = 0,
) -> Memory:
    """The memory of a rank in a training step.

    Args:
        moe_layers: whether each layer that runs on the stage has experts.
        teacher_bytes: weights of a teacher beside the student.
        taught: a teacher's forward pass comes before the student's.
        target_bytes: what a teacher, or what is stored of one, says of all micro-batches, on the last stage.
    """
    kept = in_flight * sum(map(activations.layer, moe_layers))
    working = activations.working(moe_layers, last_stage, share.largest_trained)
    if last_stage:
        # The output is one micro-batch's: its backward pass follows at once.
        kept += activations.output() + target_bytes
    if taught:
        working = max(working, activations.teacher_pass(last_stage) - kept)
    return Memory(
        weights=share.model_bytes + share.adapter_bytes,
        gradients=state.gradient_bytes(share),
        optimizer=state.optimizer_bytes(share),
        teacher=teacher_bytes,
        activations=round(kept),
        working=round(working),
    )


def forward_memory(share: Share, activations: Activations, last_stage: bool) -> Memory:
    """The memory of a rank that only runs the model."""
    return Memory(share.model_bytes, 0, 0, 0, 0, round(activations.teacher_pass(last_stage)))
