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
from megatron.core.parallel_state import get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from megaprune.mcore.layers import mark

# Without Transformer Engine, 0.16.1 sets TELinear to a placeholder that it later passes to `isinstance`, and leaves a
# router helper undefined. Both patches have no effect if Transformer Engine is installed.
if not isinstance(multi_latent_attention.TELinear, type):
    multi_latent_attention.HAVE_TE = False
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


class ScaledDotProductAttention(torch.nn.Module):
    """Causal core attention with torch's fused kernels; supports grouped queries, any value dimension, sliding windows
    in the layers that the configuration gives them, and a learned sink of each head (``softmax_offset``).
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
        self.softmax_scale = softmax_scale  # of the head dimension if None
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        # number of tokens that a token attends to
        self.window = config.window_size[0] + 1 if slides and config.window_size is not None else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))

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
        length, width, mask = query.shape[2], value.shape[3], None
        if self.window is not None and self.window < length:
            mask = _window_mask(length, self.window, query.device, self.softmax_offset is not None)
        if self.softmax_offset is not None:
            query, key, value = self._with_sink(query, key, value, self.softmax_offset)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        return context[:, :, -length:, :width].permute(2, 0, 1, 3).flatten(2)

    def _with_sink(self, query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values [b, n, s + 1, d + 8], with a token in front that all others attend to.

        The sink is a score without a value. A further dimension, of which only the key in front has any, adds it to
        this key's score, zero otherwise. The fused kernels remain usable: the query in front keeps attention causal,
        and they need equal dimensions, multiples of 8.
        """
        scale = self.softmax_scale or query.shape[3] ** -0.5
        more = query.shape[3] + 8
        scores = (sink / scale).to(query.dtype).view(1, -1, 1, 1).expand(*query.shape[:3], 1)
        query = F.pad(torch.cat([query, scores], dim=3), (0, 7, 1, 0))
        front = F.one_hot(torch.tensor(more - 8, device=key.device), more).to(key.dtype)
        key = torch.cat([front.expand(*key.shape[:2], 1, more), F.pad(key, (0, 8))], dim=2)
        return query, key, F.pad(value, (0, more - value.shape[3], 1, 0))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the sharded state dict of the sinks."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)


@lru_cache(maxsize=2)
def _window_mask(length: int, window: int, device: torch.device, sink: bool) -> Tensor:
    """Return [s, s], where True lets a token (row) attend to another: to itself and the `window` - 1 before it.

    Args:
        sink: put a token in front that all others attend to.
    """
    whole = torch.ones(length, length, dtype=torch.bool, device=device)
    mask = whole.tril() & whole.triu(1 - window)
    if not sink:
        return mask
    mask = F.pad(mask, (1, 0, 1, 0))
    mask[:, 0] = True
    return mask


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
