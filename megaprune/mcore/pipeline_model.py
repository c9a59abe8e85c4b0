"""The part of a model on one rank, which is opaque outside `megaprune.mcore`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megaprune.models.names import is_adapter, with_expert, with_layer


class Layer(NamedTuple):
    """A transformer layer and its number in the whole model, from 0."""

    number: int
    module: TransformerLayer


class PipelineModel:
    """The model chunks on this rank, in the order in which a micro-batch passes them.

    Today a rank holds one chunk. Names and layer numbers are those in the whole model, so that they are unique over all
    chunks and ranks.

    Args:
        chunks: the chunks themselves; they share one configuration.
        wrappers: the chunks as the schedule runs them, in Megatron's wrappers (bf16, DDP); None runs the bare chunks.
    """

    def __init__(self, chunks: Sequence[GPTModel], wrappers: Sequence[MegatronModule] | None = None) -> None:
        self.chunks = list(chunks)
        self.scheduled: list[MegatronModule] = list(self.chunks if wrappers is None else wrappers)

    @property
    def config(self) -> TransformerConfig:
        """The configuration of Megatron-Core."""
        return self.chunks[0].config

    @property
    def training(self) -> bool:
        """Return whether the model is in training mode."""
        return self.scheduled[0].training

    def train(self, mode: bool = True) -> "PipelineModel":
        """Set training or evaluation mode, and return the model."""
        for chunk in self.scheduled:
            chunk.train(mode)
        return self

    def eval(self) -> "PipelineModel":
        """Set evaluation mode, and return the model."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> "PipelineModel":
        """Set whether the parameters require gradients, and return the model."""
        for chunk in self.chunks:
            chunk.requires_grad_(requires_grad)
        return self

    def layers(self) -> list[Layer]:
        """Return the transformer layers in order."""
        return [Layer(layer.layer_number - 1, layer) for chunk in self.chunks for layer in chunk.decoder.layers]

    def named_modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield the modules with their names in the whole model."""
        for chunk in self.chunks:
            for name, module in chunk.named_modules():
                yield global_name(name, chunk), module

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield the parameters, including adapters, with their names in the whole model."""
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                yield global_name(name, chunk), parameter

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers with their names in the whole model."""
        for chunk in self.chunks:
            for name, buffer in chunk.named_buffers():
                yield global_name(name, chunk), buffer

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters and router biases with their names in the whole model; adapters are left out."""
        biases = ((name, buffer) for name, buffer in self.named_buffers() if name.endswith("router.expert_bias"))
        for name, weight in chain(self.named_parameters(), biases):
            if not is_adapter(name):
                yield name, weight

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters, including adapters."""
        return (parameter for chunk in self.chunks for parameter in chunk.parameters())

    def buffers(self) -> Iterator[Tensor]:
        """Yield the buffers."""
        return (buffer for chunk in self.chunks for buffer in chunk.buffers())

    @contextmanager
    def watched_layers(self, watch: Callable[[int, Tensor, Tensor], Tensor | None]) -> Iterator[None]:
        """Call `watch` on every layer's pass within the block. With full recomputation, layers pass twice: without
        gradients, and with them.

        Args:
            watch: called with the layer's number, its input and its output, [s, b, h] each, or [s / tp, b, h] under
                sequence parallelism. A tensor that it returns replaces the output.
        """
        hooks = [
            layer.module.register_forward_hook(_hook(layer.number, watch), with_kwargs=True) for layer in self.layers()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def predicting_ahead(self) -> Iterator[None]:
        """Return the logits of MTP layers behind those of the model within the block, along the first dimension."""
        for chunk in self.chunks:
            chunk.predicts_ahead = True
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.predicts_ahead = False

    def sharded_state_dict(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Return the sharded state dict of the model for Megatron's dist_checkpointing."""
        (chunk,) = self.chunks
        return chunk.sharded_state_dict(metadata=metadata)

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Load what dist_checkpointing has loaded into the entries of `sharded_state_dict`.

        Args:
            strict: whether every weight must be among the state.
        """
        (chunk,) = self.chunks
        chunk.load_state_dict(state, strict=strict)


def global_name(name: str, chunk: GPTModel) -> str:
    """Return the name in the whole model of a parameter, buffer or module of a chunk."""

    def first_expert() -> int:
        local = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        return local * parallel_state.get_expert_model_parallel_rank()

    # The name of an MTP layer's transformer layer from 0.17 on. Checkpoints keep the older name.
    name = name.replace(".mtp_model_layer.", ".transformer_layer.")
    name = with_layer(name, lambda layer: chunk.decoder.layers[layer].layer_number - 1)
    return with_expert(name, lambda expert: first_expert() + expert)


def _hook(number: int, watch: Callable[[int, Tensor, Tensor], Tensor | None]) -> Callable[..., Any]:
    """Return a layer's forward hook that calls `watch`."""

    def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]) -> Any:
        replaced = watch(number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], output[0])
        return None if replaced is None else (replaced, *output[1:])

    return hook
