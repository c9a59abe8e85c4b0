from typing import Any

import torch


def apply_rotary_pos_emb(
    t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False, **kernel: Any
) -> torch.Tensor:
    """Rotate t [s, b, n, d] by the angles [s, 1, 1, r] of its first r dimensions, in fp32 as the kernel does."""
    assert not interleaved and kernel["tensor_format"] == "sbhd", kernel
    rotated, rest = t[..., : freqs.shape[-1]].float(), t[..., freqs.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * freqs.cos() + torch.cat([-second, first], dim=-1) * freqs.sin()
    return torch.cat([turned.to(t.dtype), rest], dim=-1)
