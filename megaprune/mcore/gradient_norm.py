"""Norm of all gradients where neither Transformer Engine nor apex is installed.

The core's own substitute makes a tensor on the host of the norms of all parameters: on a GPU, the host then waits for
each of them. On import, this module puts a norm in its place that stays on the device.
"""

from collections.abc import Sequence
from typing import Any

import megatron.core.optimizer.clip_grads as clip_grads
import torch
from megatron.core.utils import local_multi_tensor_l2_norm
from torch import Tensor


def l2_norm(chunk_size: int, noop_flag: Tensor, tensor_lists: Sequence[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """Return the norm [1] of all tensors of a list together, as the core's function of the same arguments does."""
    return torch.nn.utils.get_total_norm(tensor_lists[0]).float().reshape(1), None


if clip_grads.l2_norm_impl is local_multi_tensor_l2_norm:
    clip_grads.l2_norm_impl = l2_norm
