"""The memory of one rank in training, by component."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

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
        margin: what is no tensor, see `margin_bytes`.
    """

    weights: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    working: int
    margin: int = 0

    @property
    def tensors(self) -> int:
        """The bytes of all tensors."""
        return self.weights + self.gradients + self.optimizer + self.teacher + self.activations + self.working

    @property
    def total(self) -> int:
        """The sum of all components."""
        return self.tensors + self.margin


# What is no tensor, on a GPU. Not measured by this project: round numbers above those that are commonly reported.
CONTEXT_BYTES = round(0.75 * 2**30)  # the CUDA context, kernels, and workspaces of cuBLAS and of fused attention
GROUP_BYTES = 2**28  # buffers of an NCCL communicator
FRAGMENTATION = 0.04  # of the tensors, which the caching allocator can't use


def with_margin(memory: Memory, groups: int) -> Memory:
    """Return the memory with a margin for the CUDA context, workspaces, NCCL and fragmentation.

    Args:
        groups: number of process groups of several ranks that this rank is in.
    """
    return replace(memory, margin=margin_bytes(memory.tensors, groups))


def margin_bytes(tensors: int, groups: int) -> int:
    """Return the bytes that are needed besides these bytes of tensors."""
    return CONTEXT_BYTES + groups * GROUP_BYTES + round(FRAGMENTATION * tensors)


@dataclass(frozen=True)
class TrainingState:
    """Storage of gradients and optimizer state.

    Args:
        shards: ranks over which the optimizer state of a parameter is distributed; 1 without the distributed optimizer.
        expert_shards: the same for parameters of routed experts.
        averages: whether an average of the weights is kept, which is not distributed.
    """

    bf16: bool
    shards: int = 1
    expert_shards: int = 1
    averages: bool = False

    def gradient_bytes(self, share: Share) -> int:
        """Return the bytes of a rank's gradients."""
        return _FP32 * (share.trained + share.trained_experts)

    def optimizer_bytes(self, share: Share) -> int:
        """Return the bytes of a rank's optimizer state, and of the average of its weights."""
        sharded = self._states() * (share.trained / self.shards + share.trained_experts / self.expert_shards)
        return round(sharded) + (self.gradient_bytes(share) if self.averages else 0)

    def saved_bytes(self) -> int:
        """Return the bytes of a trained parameter in a checkpoint: the weight, optimizer state and average."""
        return (2 if self.bf16 else _FP32) + self._states() + (_FP32 if self.averages else 0)

    def _states(self) -> int:
        return _FP32 * (3 if self.bf16 else 2)


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


def importance_memory(
    share: Share,
    activations: Activations,
    moe_layers: Sequence[bool],
    last_stage: bool,
    gradients: Literal["mask", "weights"] | None,
    micro_batches: int,
    in_flight: int,
) -> Memory:
    """Return the memory of a rank while layers are evaluated on the original model, which has no adapters yet.

    Args:
        gradients: what a backward pass computes gradients of; None for forward passes alone.
        micro_batches: micro-batches of a step, whose original logits are kept for a backward pass.
        in_flight: micro-batches whose activations the stage holds at once in a backward pass.
    """
    kept = activations.hidden_states(len(moe_layers), 1)  # outputs of layers, which are reused by later masks
    working = activations.teacher_pass(last_stage)
    if last_stage:
        working = max(working, activations.comparison())
    if gradients is not None:
        kept = in_flight * sum(map(activations.layer, moe_layers))
        kept += activations.output() if last_stage else 0
        if last_stage and gradients == "mask":
            kept += micro_batches * activations.logits()
        largest = share.largest_trained if gradients == "weights" else 0
        working = max(working - kept, activations.working(moe_layers, last_stage, largest))
    buffers = _FP32 * share.parameters if gradients == "weights" else 0
    return Memory(share.model_bytes, buffers, 0, 0, round(kept), round(working))


def resting_memory(share: Share, state: TrainingState, teacher_bytes: int) -> Memory:
    """Return the memory of a rank between steps: while the pruned student is built and loaded, after the searched one
    has been freed, and while a checkpoint is saved. Each rank reads and writes its own part of the optimizer's state.

    Args:
        teacher_bytes: weights of a separate teacher, which stays.
    """
    return Memory(
        weights=share.model_bytes + share.adapter_bytes,
        gradients=state.gradient_bytes(share),
        optimizer=state.optimizer_bytes(share),
        teacher=teacher_bytes,
        activations=0,
        # The gate and up projections of a layer are stored separately, so that one joined copy exists in between.
        working=_FP32 * share.largest_trained,
    )


def forward_memory(share: Share, activations: Activations, last_stage: bool) -> Memory:
    """Return the memory of a rank that runs only forward passes."""
    return Memory(share.model_bytes, 0, 0, 0, 0, round(activations.teacher_pass(last_stage)))
