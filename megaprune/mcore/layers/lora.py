"""LoRA (Hu et al. 2021) on Megatron's parallel linear layers: ``W x + (alpha / r) B A x`` with W frozen.

A linear layer is made into its LoRA form in place, so that every other name in the model stays what it was. A
column-parallel layer holds all of A and its rows of B; a row-parallel one its columns of A and all of B. What is held
in whole is the same on every rank, and so is its gradient: the collectives below see to it, for dense layers over the
tensor-parallel group, for routed experts over their own.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
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

TARGETS = (
    *("linear_qkv", "linear_proj", "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj"),
    *("linear_kv_down_proj", "linear_kv_up_proj", "linear_fc1", "linear_fc2"),
)
_ADAPTER = re.compile(r"\.lora_[ab]$")


@dataclass(frozen=True)
class LoRAOptions:
    """``--lora-rank``, ``--lora-alpha`` (scale alpha / rank) and the names of the linear layers that get adapters."""

    rank: int
    alpha: float
    targets: Sequence[str] = TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class _LoRALinear:
    """What both forms share. ``enabled`` turns the adapter off for a pass through the base model."""

    lora: LoRAOptions
    lora_a: torch.nn.Parameter
    lora_b: torch.nn.Parameter
    enabled: bool

    def _attach(self, options: LoRAOptions) -> None:
        self.lora, self.enabled = options, True
        self.lora_a = self._parameter(options.rank, self.weight.shape[1], cut=self.cut_a)
        self.lora_b = self._parameter(self.weight.shape[0], options.rank, cut=not self.cut_a)

    def _parameter(self, rows: int, columns: int, cut: bool) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(self.weight.new_zeros(rows, columns))
        parameter.allreduce = self.weight.allreduce
        # What is held in whole counts once in the gradient's norm, on the first rank of its group; the core would take
        # the dense layers' group for the experts' too.
        counts_here = cut or self.tp_group.rank() == 0
        set_tensor_model_parallel_attributes(parameter, counts_here, int(self.cut_a), 1)
        parameter.shared = not counts_here
        # Under sequence parallelism, a dense layer's whole matrix sees this rank's part of the tokens.
        parameter.sequence_parallel = not cut and not self.is_expert and self.config.sequence_parallel
        return parameter

    def merge(self) -> None:
        """Adds the adapter to this rank's shard of the weight, rounding once, and leaves it without effect."""
        delta = self.lora.scale * (self.lora_b.float() @ self.lora_a.float())
        self.weight.copy_(self.weight.float() + delta)
        self.lora_b.zero_()

    def _sharded_adapter(self, prefix: str, offsets: tuple, metadata: dict, axes: dict[str, int]) -> dict:
        state = {name: getattr(self, name) for name in ("lora_a", "lora_b")}
        return make_sharded_tensors_for_checkpoint(
            state, prefix, axes, offsets, tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"]
        )


def _without_adapter(state: dict) -> dict:
    return {key: value for key, value in state.items() if not _ADAPTER.search(key)}


class LoRAColumnParallelLinear(_LoRALinear, ColumnParallelLinear):
    """Column-parallel: A [r, in] on every rank, B [out / tp, r] cut."""

    cut_a = False

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """[..., in] to [..., out / tp]."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.enabled:
            return output, bias
        if self.explicit_expert_comm:
            # The dispatcher has gathered the tokens, and adds up the ranks' gradients of them: each rank's is a part,
            # and so is its gradient of A.
            lora_a = copy_to_tensor_model_parallel_region(self.lora_a, group=self.tp_group)
            latent = F.linear(input_, lora_a)
        elif self.sequence_parallel:
            latent = gather_from_sequence_parallel_region(F.linear(input_, self.lora_a), group=self.tp_group)
        else:
            latent = copy_to_tensor_model_parallel_region(F.linear(input_, self.lora_a), group=self.tp_group)
        return output + F.linear(self.lora.scale * latent, self.lora_b), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The base layer's, and the adapter's."""
        base = _without_adapter(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        adapter = self._sharded_adapter(prefix, sharded_offsets, metadata, {"lora_b": 0})
        if prefix.endswith("linear_fc1."):
            # gate and up are cut one by one, as in the weight
            key = f"{prefix}lora_b"
            adapter[key] = apply_swiglu_sharded_factory(adapter[key], sharded_offsets)
        return base | adapter


class LoRARowParallelLinear(_LoRALinear, RowParallelLinear):
    """Row-parallel: A [r, in / tp] cut, B [out, r] on every rank."""

    cut_a = True

    def forward(self, input_: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        """[..., in / tp] to [..., out]."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.enabled:
            return output, bias
        latent, lora_b = F.linear(input_, self.lora_a), self.lora_b
        if self.explicit_expert_comm:
            # The dispatcher adds up the ranks' outputs, which are linear in their parts of the latent; each rank's
            # gradient of B is then a part, too.
            lora_b = copy_to_tensor_model_parallel_region(lora_b, group=self.tp_group)
        elif self.sequence_parallel:
            latent = reduce_scatter_to_sequence_parallel_region(latent, group=self.tp_group)
        else:
            latent = reduce_from_tensor_model_parallel_region(latent, group=self.tp_group)
        return output + F.linear(self.lora.scale * latent, lora_b), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The base layer's, and the adapter's."""
        base = _without_adapter(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        return base | self._sharded_adapter(prefix, sharded_offsets, metadata, {"lora_a": 1})


_FORMS = {ColumnParallelLinear: LoRAColumnParallelLinear, RowParallelLinear: LoRARowParallelLinear}


def add_adapters(model: GPTModel, options: LoRAOptions) -> None:
    """Freezes the model and gives its decoder's targeted linear layers their adapters (undefined: see
    `initialize_adapter`)."""
    model.requires_grad_(False)
    for name, module in list(model.decoder.named_modules()):
        if name.rpartition(".")[2] in options.targets and type(module) in _FORMS:
            module.__class__ = _FORMS[type(module)]
            module._attach(options)


def adapted_layers(model: torch.nn.Module) -> dict[str, _LoRALinear]:
    """LoRA layers by their module's name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _LoRALinear)}


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    return bool(_ADAPTER.search(name))


def initialize_adapter(layer: _LoRALinear, global_name: str, seed: int) -> None:
    """A as in PEFT (uniform, Kaiming with a = sqrt 5), B zero: the same whatever the layout.

    Args:
        global_name: the layer's name in the whole model, from which, with the seed, A is drawn.
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
def merge_adapters(model: torch.nn.Module) -> None:
    """Adds every adapter to its weight, and leaves it without effect."""
    for layer in adapted_layers(model).values():
        layer.merge()


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Passes within the block see the base model."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True
