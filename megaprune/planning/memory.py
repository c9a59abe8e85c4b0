"""The memory of one rank in training, by component."""

from collections.abc import Sequence
from dataclasses import dataclass

from megaprune.mcore.simulation import Share
from megaprune.planning.activations import Activations

_FP32 = 4


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank of a pipeline stage.

    Args:
        weights: the trained model, including adapters.
        gradients: Megatron's fp32 gradient buffers.
        optimizer: Adam's two moments; in bf16 also the fp32 copies of the weights.
        teacher: weights of a frozen copy of the original model.
        activations: tensors of all micro-batches in flight, kept for the backward pass.
        working: peak of temporary tensors in a pass.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """The sum of all components."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations + self.working


@dataclass(frozen=True)
class TrainingState:
    """Storage of gradients and optimizer state.

    Args:
        shards: ranks over which the optimizer state of a parameter is distributed; 1 without the distributed optimizer.
        expert_shards: the same for parameters of routed experts.
    """

    bf16: bool
    shards: int = 1
    expert_shards: int = 1

    def gradient_bytes(self, share: Share) -> int:
        """Return the bytes of a rank's gradients."""
        return _FP32 * (share.trained + share.trained_experts)

    def optimizer_bytes(self, share: Share) -> int:
        """Return the bytes of a rank's optimizer state."""
        per_parameter = _FP32 * (3 if self.bf16 else 2)
        return round(per_parameter * (share.trained / self.shards + share.trained_experts / self.expert_shards))


def micro_batches_in_flight(stage: int, num_stages: int, num_micro_batches: int) -> int:
    """Return the number of micro-batches whose activations a stage holds at once in Megatron's 1F1B schedule."""
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
    hidden_bytes: float = 0,
) -> Memory:
    """Return the memory of a rank in a training step.

    Args:
        moe_layers: for each active layer of the stage, True if it has experts.
        teacher_bytes: weights of a separate teacher.
        taught: a forward pass of the teacher precedes the student's.
        target_bytes: the teacher's outputs for all micro-batches, on the last stage.
        hidden_bytes: the teacher's hidden states of the stage's layers for all micro-batches.
    """
    kept = in_flight * sum(map(activations.layer, moe_layers)) + hidden_bytes
    working = activations.working(moe_layers, last_stage, share.largest_trained)
    if last_stage:
        # The output of only one micro-batch is kept: its backward pass follows immediately.
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
    """Return the memory of a rank that runs only forward passes."""
    return Memory(share.model_bytes, 0, 0, 0, 0, round(activations.teacher_pass(last_stage)))
