"""What the local layer spec lacks without Transformer Engine: a core attention without a quadratic score matrix, an
RMSNorm that works under sequence parallelism, and latent attention whose gradients are whole under tensor parallelism.
All serve a GPU as well as the CPU."""

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
from torch import Tensor

# Without Transformer Engine, 0.16.1 leaves a stand-in where it later asks `isinstance(..., TELinear)`, and a router
# helper undefined. Both are no-ops where it is installed.
if not isinstance(multi_latent_attention.TELinear, type):
    multi_latent_attention.HAVE_TE = False
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


class ScaledDotProductAttention(torch.nn.Module):
    """Causal core attention on torch's fused kernels, with grouped queries and any value dimension."""

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [s, b, n, d], key [s, b, g, d], value [s, b, g, dv] to [s, b, n * dv]."""
        context = F.scaled_dot_product_attention(
            *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != query.shape[2],
        )
        return context.permute(2, 0, 1, 3).flatten(2)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight tells the core that its gradient is partial under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel


class LatentAttention(multi_latent_attention.MLASelfAttention):
    """Multi-head latent attention whose RoPE key gets the gradient of all heads under sequence parallelism.

    The key/value down-projection is cut over the tensor-parallel ranks here, and 0.16.1 gathers its parts so that the
    gradient of the RoPE key, which every rank's heads use, stays one rank's. Handed the output of a projection that
    is not cut, as Transformer Engine's is, it sums that gradient over the ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.sequence_parallel:
            self.linear_kv_down_proj.register_forward_hook(_as_if_not_cut)


def _as_if_not_cut(module: torch.nn.Module, inputs: Any, output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    """[s, b, latent / tp] to [s / tp, b, latent]."""
    whole = gather_from_tensor_model_parallel_region(output[0], group=module.tp_group)
    return scatter_to_sequence_parallel_region(whole, group=module.tp_group), output[1]
