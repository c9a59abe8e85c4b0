"""Modules for layers without Transformer Engine, on CPU and GPU.

They replace modules of the core's local layer spec: a core attention without a quadratic score matrix, an RMSNorm that
supports sequence parallelism, and latent attention with correct gradients under tensor parallelism.
"""

from functools import lru_cache
from typing import Any

import megatron.core.transformer.moe.moe_utils as moe_utils
import megatron.core.transformer.multi_latent_attention as multi_latent_attention
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megaprune.mcore.layers import mark

# Without Transformer Engine, 0.16.1 sets TELinear to a placeholder that it later passes to `isinstance`, and leaves a
# router helper undefined. Both patches have no effect if Transformer Engine is installed.
if not isinstance(multi_latent_attention.TELinear, type):
    multi_latent_attention.HAVE_TE = False
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


class ScaledDotProductAttention(torch.nn.Module):
    """Causal core attention with torch's fused kernels; supports grouped queries, any value dimension, and sliding
    windows in the layers that the configuration gives them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        *args: Any,
        softmax_scale: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # number of tokens that a token attends to
        self.window = config.window_size[0] + 1 if slides and config.window_size is not None else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the attention output [s, b, n * dv].

        Args:
            query: [s, b, n, d].
            key: [s, b, g, d] with g query groups.
            value: [s, b, g, dv].
            args: other positional arguments of the core's attention, which causal attention does not need.
            kwargs: other keyword arguments of the core's attention.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        length, mask = query.shape[2], None
        if self.window is not None and self.window < length:
            mask = _window_mask(length, self.window, query.device)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


@lru_cache(maxsize=2)
def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return [s, s], where True lets a token (row) attend to another: to itself and the `window` - 1 before it."""
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    return whole.tril() & whole.triu(1 - window)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm with its weight marked for sequence parallelism, where each rank has a part of the weight's gradient.

    Zero-centered norms, which the configuration may ask for, multiply by 1 + weight.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        mark(self.weight, sequence_parallel=config.sequence_parallel)
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input, in its dtype."""
        if not self.zero_centered:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class LatentAttention(multi_latent_attention.MLASelfAttention):
    """Multi-head latent attention with the correct gradient of the RoPE key under sequence parallelism.

    The heads of all ranks use the RoPE key. Without Transformer Engine, the key/value down-projection is sharded over
    the tensor-parallel ranks, and 0.16.1 gathers its output such that the key gets the gradient of one rank's heads
    only. With an unsharded projection, as in Transformer Engine, it sums the gradient over the ranks. This class
    therefore gathers the projection's output and returns it in the form of an unsharded projection.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.sequence_parallel:
            self.linear_kv_down_proj.register_forward_hook(_as_unsharded)


def _as_unsharded(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """Convert the projection's output from [s, b, latent / tp] to [s / tp, b, latent]."""
    whole = gather_from_tensor_model_parallel_region(output[0], group=module.tp_group)
    return scatter_to_sequence_parallel_region(whole, group=module.tp_group), output[1]
