"""Sandwich-norm layers (openPangu-Ultra): the outputs of attention and MLP are normalized before the residual add."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megaprune.mcore.layers.gated import GatedTransformerLayer
from megaprune.mcore.layers.local import RMSNorm

# Megatron-Core's bias, dropout and residual addition, by (training, fused)
_Add = Callable[[bool, bool], Callable[..., Tensor]]


class SandwichTransformerLayer(TransformerLayer):
    """Layer with ``x + post_attention_layernorm(attention(...))``, then ``x + post_mlp_layernorm(mlp(...))``."""

    self_attn_bda: _Add
    mlp_bda: _Add

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.post_mlp_layernorm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attn_bda = _normalized(self.post_attention_layernorm, self.self_attn_bda)
        self.mlp_bda = _normalized(self.post_mlp_layernorm, self.mlp_bda)


class GatedSandwichTransformerLayer(GatedTransformerLayer, SandwichTransformerLayer):
    """Sandwich-norm layer with a gate."""


def _normalized(norm: torch.nn.Module, add: _Add) -> _Add:
    """Return the core's bias, dropout and residual addition with a norm before it."""

    def normalized_add(training: bool, fused: bool) -> Callable[..., Tensor]:
        inner = add(training, fused)

        def run(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            return inner((norm(output if bias is None else output + bias), None), residual, dropout)

        return run

    return normalized_add
