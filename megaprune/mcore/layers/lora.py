"""LoRA (Hu et al., 2021) on Megatron's parallel linear layers: ``W x + (alpha / r) B A x`` with W frozen.

A linear layer is converted in place, so that the names of all other parameters stay the same. A column-parallel layer
holds the full A and a shard of B; a row-parallel layer holds a shard of A and the full B. The full matrix is
replicated, and the collectives below give it the same gradient on every rank: over the tensor-parallel group for dense
layers, over the expert-tensor-parallel group for routed experts.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megaprune.mcore.layers import mark
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.models.names import is_adapter

TARGETS = (
    *("linear_qkv", "linear_proj", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj", "linear_fc1", "linear_fc2"),
)


@dataclass(frozen=True)
class LoRAOptions:
    """Options of adapters.

    Args:
        rank: ``--lora-rank``.
        alpha: ``--lora-alpha``; the adapter is scaled by alpha / rank.
        targets: names of the linear layers that get adapters.
    """

    rank: int
    alpha: float
    targets: Sequence[str] = TARGETS

    @property
    def scale(self) -> float:
        """Factor of the adapter's output."""
        return self.alpha / self.rank


class _LoRALinear:
    """Code shared by both kinds of parallel layers. `enabled` False runs the base layer without the adapter."""

    # attributes of the parallel layer
    weight: torch.nn.Parameter
    tp_group: torch.distributed.ProcessGroup
    is_expert: bool
    config: ModelParallelConfig
    # whether A is sharded; otherwise B is
    cut_a: bool
    lora: LoRAOptions
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    enabled: bool

    def _attach(self, options: LoRAOptions) -> None:
        """Create the adapter's parameters."""
        self.lora, self.enabled = options, True
        self.lora_a = self._parameter(options.rank, self.weight.shape[1], cut=self.cut_a)
        self.lora_b = self._parameter(self.weight.shape[0], options.rank, cut=not self.cut_a)

    def _parameter(self, rows: int, columns: int, cut: bool) -> torch.nn.Parameter:
        """Return a matrix with the attributes that Megatron-Core reads; `cut` says whether it is sharded."""
        parameter = torch.nn.Parameter(self.weight.new_zeros(rows, columns))
        # A replicated matrix must be counted once in the gradient norm: on the first rank of its group. The core would
        # use the group of dense layers for experts, too.
        counts_here = cut or self.tp_group.rank() == 0
        set_tensor_model_parallel_attributes(parameter, counts_here, int(self.cut_a), 1)
        mark(
            parameter,
            allreduce=getattr(self.weight, "allreduce", True),
            shared=not counts_here,
            # Under sequence parallelism, the replicated matrix of a dense layer sees only this rank's tokens.
            sequence_parallel=not cut and not self.is_expert and self.config.sequence_parallel,
        )
        return parameter

    def merge(self) -> None:
        """Add the adapter to this rank's shard of the weight, rounding once, and set B to zero."""
        delta = self.lora.scale * (self.lora_b.float() @ self.lora_a.float())
        self.weight.copy_(self.weight.float() + delta)
        self.lora_b.zero_()

    def _sharded_adapter(
        self, prefix: str, offsets: tuple[Any, ...], metadata: dict[str, Any] | None, axes: dict[str, int]
    ) -> dict[str, Any]:
        """Return the sharded state dict of the adapter; `axes` gives the sharded axis of the sharded matrix."""
        state = {name: getattr(self, name) for name in ("lora_a", "lora_b")}
        assert metadata is not None  # checkpoints always pass it
        return make_sharded_tensors_for_checkpoint(
            state, prefix, axes, offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )


def _without_adapter(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not is_adapter(key)}


class LoRAColumnParallelLinear(_LoRALinear, ColumnParallelLinear):
    """Column-parallel linear layer with an adapter: A [r, in] replicated, B [out / tp, r] sharded."""

    cut_a = False

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output [..., out / tp] and the base layer's bias for an input [..., in]."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.enabled:
            return output, bias
        if self.explicit_expert_comm:
            # The dispatcher has gathered the tokens and sums their gradients over the ranks. Each rank therefore has a
            # part of the gradient of A, which this function sums as well.
            lora_a = copy_to_tensor_model_parallel_region(self.lora_a, group=self.tp_group)
            latent = F.linear(input_, lora_a)
        elif self.sequence_parallel:
            latent = gather_from_sequence_parallel_region(F.linear(input_, self.lora_a), group=self.tp_group)
        else:
            latent = copy_to_tensor_model_parallel_region(F.linear(input_, self.lora_a), group=self.tp_group)
        return output + F.linear(self.lora.scale * latent, self.lora_b), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict of the base layer and the adapter."""
        base = _without_adapter(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        adapter = self._sharded_adapter(prefix, sharded_offsets, metadata, {"lora_b": 0})
        if prefix.endswith("linear_fc1."):
            # Gate and up projection are sharded separately, as in the weight.
            key = f"{prefix}lora_b"
            adapter[key] = apply_swiglu_sharded_factory(adapter[key], sharded_offsets)
        return base | adapter


class LoRARowParallelLinear(_LoRALinear, RowParallelLinear):
    """Row-parallel linear layer with an adapter: A [r, in / tp] sharded, B [out, r] replicated."""

    cut_a = True

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Return the output [..., out] and the base layer's bias for an input [..., in / tp]."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.enabled:
            return output, bias
        latent, lora_b = F.linear(input_, self.lora_a), self.lora_b
        if self.explicit_expert_comm:
            # The dispatcher sums the outputs of the ranks, so that the latent need not be reduced here. Each rank
            # therefore has a part of the gradient of B, which this function sums.
            lora_b = copy_to_tensor_model_parallel_region(lora_b, group=self.tp_group)
        elif self.sequence_parallel:
            latent = reduce_scatter_to_sequence_parallel_region(latent, group=self.tp_group)
        else:
            latent = reduce_from_tensor_model_parallel_region(latent, group=self.tp_group)
        return output + F.linear(self.lora.scale * latent, lora_b), bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict of the base layer and the adapter."""
        base = _without_adapter(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        return base | self._sharded_adapter(prefix, sharded_offsets, metadata, {"lora_a": 1})


_FORMS = {ColumnParallelLinear: LoRAColumnParallelLinear, RowParallelLinear: LoRARowParallelLinear}


def add_adapters(model: PipelineModel, options: LoRAOptions) -> None:
    """Freeze the model and add adapters to the targeted linear layers of its transformer layers.

    `initialize_adapter` initializes an adapter.
    """
    model.requires_grad_(False)
    for layer in model.layers():
        for name, module in list(layer.module.named_modules()):
            if name.rpartition(".")[2] in options.targets and type(module) in _FORMS:
                module.__class__ = _FORMS[type(module)]
                module._attach(options)


def adapted_layers(model: PipelineModel) -> dict[str, _LoRALinear]:
    """Return the layers with adapters by their module name in the whole model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LoRALinear)}


def initialize_adapter(layer: _LoRALinear, global_name: str, seed: int) -> None:
    """Initialize A as PEFT does (Kaiming uniform with a = sqrt(5)) and B to zero.

    The values depend only on `seed` and `global_name`, not on the parallel layout.

    Args:
        layer: layer with the adapter.
        global_name: the layer's name in the whole model.
        seed: seed of all adapters.
    """
    tp = layer.tp_group.size() if layer.cut_a else 1
    columns = layer.lora_a.shape[1]
    digest = hashlib.blake2b(f"{seed}:{global_name}".encode(), digest_size=4).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    bound = 1 / math.sqrt(columns * tp)
    whole = (torch.rand(layer.lora.rank, columns * tp, generator=generator) * 2 - 1) * bound
    start = layer.tp_group.rank() * columns if layer.cut_a else 0
    with torch.no_grad():
        layer.lora_a.copy_(whole[:, start : start + columns])
        layer.lora_b.zero_()


@torch.no_grad()
def merge_adapters(model: PipelineModel) -> None:
    """Add every adapter to its weight, and set its B to zero."""
    for layer in adapted_layers(model).values():
        layer.merge()


@contextmanager
def adapters_off(model: PipelineModel) -> Iterator[None]:
    """Run the base model without adapters within the block."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
