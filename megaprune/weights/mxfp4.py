"""MXFP4 weights as GPT-OSS stores them: FP4 numbers, two in a byte, with an exponent for each block of 32."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK, PER_BYTE = 32, 2
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the exponents
_BAND = 256  # rows at a time, so that what is unpacked stays small


@lru_cache
def _numbers() -> torch.Tensor:
    """Return the two numbers of each byte: that of the lower four bits first."""
    import torch

    single = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
    return torch.tensor([(low, high) for high, low in itertools.product(single, repeat=2)])


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return a matrix in bf16: each number times two to the power of the exponent of its block.

    Args:
        blocks: [rows, blocks, 16] uint8.
        scales: [rows, blocks] uint8, the exponents plus 127.
    """
    import torch

    rows, columns = blocks.shape[0], blocks.shape[1] * BLOCK
    out = torch.empty(rows, columns, dtype=torch.bfloat16)
    exponents = (scales.view(torch.uint8).int() - _BIAS).unsqueeze(-1)
    for start in range(0, rows, _BAND):
        band = slice(start, start + _BAND)
        numbers = _numbers()[blocks[band].int()].flatten(2)  # [band, blocks, 32]
        out[band] = torch.ldexp(numbers, exponents[band]).flatten(1)
    return out
