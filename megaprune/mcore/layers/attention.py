"""Grouped-query attention with the variants of some families that Megatron-Core's own does not have."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megaprune.models.tables import QueryGrowth


@dataclass(frozen=True)
class AttentionVariant:
    """Differences from the core's attention.

    Args:
        output_bias: whether the output projection has a bias.
        window_scale: factor of the attention scores in layers with a sliding window; None as in the other layers.
        query_growth: growth of queries with their position.
    """

    output_bias: bool = False
    window_scale: float | None = None
    query_growth: QueryGrowth | None = None


class VariantAttention(SelfAttention):
    """Self-attention with a variant. `window_rope` is set after the model is built, in layers with a sliding window."""

    def __init__(
        self, config: TransformerConfig, *args: Any, layer_number: int, variant: AttentionVariant, **kwargs: Any
    ) -> None:
        self.has_window = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # The core reads biases and the scale from the configuration while it builds.
        built_with = copy.copy(config)
        built_with.add_bias_linear = variant.output_bias
        if self.has_window and variant.window_scale is not None:
            built_with.softmax_scale = variant.window_scale
        super().__init__(built_with, *args, layer_number=layer_number, **kwargs)
        self.config, self.variant = config, variant
        self.window_rope: RotaryEmbedding | None = None

    def forward(
        self, *args: Any, rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the output and the bias of the output projection, with the arguments of the core's attention."""
        if self.window_rope is not None and rotary_pos_emb is not None:
            length = len(rotary_pos_emb[0] if isinstance(rotary_pos_emb, tuple) else rotary_pos_emb)
            rotary_pos_emb = self.window_rope(length)
        return super().forward(*args, rotary_pos_emb=rotary_pos_emb, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """Return query, key and value; the query with its growth, which commutes with RoPE."""
        query, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        growth = self.variant.query_growth
        if growth is not None:
            positions = torch.arange(len(query), device=query.device)
            factor = 1 + growth.beta * torch.log1p(positions // growth.original_length)
            query = query * factor.to(query.dtype).view(-1, 1, 1, 1)
        return (query, *rest)


class NormOverHeads(torch.nn.Module):
    """RMSNorm over the dimensions of all heads together, which tensor parallelism divides.

    Args:
        config: the model's configuration.
        hidden_size: dimension of a head.
        eps: added to the mean of squares.
        of_keys: whether the heads are those of keys, otherwise of queries.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, of_keys: bool) -> None:
        super().__init__()
        heads = config.num_query_groups if of_keys else config.num_attention_heads
        assert heads is not None
        self.eps, self.width, self.tp_group = eps, heads * hidden_size, get_tensor_model_parallel_group()
        here = self.width // self.tp_group.size()
        self.weight = torch.nn.Parameter(torch.empty(here, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, heads: Tensor) -> Tensor:
        """Return the normalized heads of this rank, [s, b, n / tp, d]."""
        values = heads.flatten(2).float()
        squares = values.square().sum(-1, keepdim=True)
        # The heads of all ranks depend on the sum, so that its gradient is summed over the ranks as well.
        squares = reduce_from_tensor_model_parallel_region(squares, group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)
        normalized = values * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normalized.to(heads.dtype)).view(heads.shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets
        )


class QueryNormOverHeads(NormOverHeads):
    """Norm of queries over all heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps, of_keys=False)


class KeyNormOverHeads(NormOverHeads):
    """Norm of keys over all heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps, of_keys=True)
