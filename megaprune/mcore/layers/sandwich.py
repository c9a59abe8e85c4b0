"""openPangu-Ultra's layer: a norm behind attention and one behind the MLP, before each is added to the residual."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megaprune.mcore.layers.gated import GatedTransformerLayer
from megaprune.mcore.layers.local import RMSNorm


class SandwichTransformerLayer(TransformerLayer):
    """``x + post_attention_layernorm(attention(...))``, then ``x + post_mlp_layernorm(mlp(...))``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.post_attention_layernorm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.post_mlp_layernorm = RMSNorm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attn_bda = _behind(self.post_attention_layernorm, self.self_attn_bda)
        self.mlp_bda = _behind(self.post_mlp_layernorm, self.mlp_bda)


class GatedSandwichTransformerLayer(GatedTransformerLayer, SandwichTransformerLayer):
    """A sandwich layer behind its gate."""


def _behind(norm: torch.nn.Module, add: Callable[[bool, bool], Callable[..., Tensor]]) -> Callable[..., Any]:
    """The core's bias, dropout and residual addition with a norm before it."""

    def normalised(training: bool, fused: bool) -> Callable[..., Tensor]:
        inner = add(training, fused)

        def run(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            output, bias = output_with_bias
            return inner((norm(output if bias is None else output + bias), None), residual, dropout)

        return run

    return normalised
