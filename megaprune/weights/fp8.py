"""Block-FP8 weights as DeepSeek-R1 stores them: a float8 matrix and one fp32 scale for each 128 x 128 block of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"

# e4m3's sign, exponent and mantissa are half precision's but for the exponent's bias: shifted to their place there, the
# bits stand for the number over 256. All of it, subnormal numbers too, but NaN (all ones). torch converts half
# precision ten times as fast as e4m3.
_OF_HALF = 256.0
_SIGN_AND_MAGNITUDE = 0xBF80 - 0x10000
_BAND = 64  # rows at a time, which stay in the cache; a divisor of BLOCK


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix. Blocks at the end may be smaller."""
    return tuple(-(-length // BLOCK) for length in shape)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, row: int = 0, column: int = 0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a matrix, or a part of one, in bf16: each number times the scale of its block.

    Args:
        weight: [rows, columns] float8.
        scale: the scales of the whole matrix.
        row: the row of the matrix at which the part begins; ``column`` likewise.
        out: the result, [rows, columns] bf16; allocated if not given.
    """
    import torch

    rows, columns = weight.shape
    first_column = column // BLOCK
    by_block = scale[:, first_column : -(-(column + columns) // BLOCK)].float() * _OF_HALF
    # blocks may begin before the part: repeat them completely, then slice
    by_column = by_block.repeat_interleave(BLOCK, 1)[:, column % BLOCK :][:, :columns]
    out = torch.empty(rows, columns, dtype=torch.bfloat16) if out is None else out
    stored = weight.view(torch.int8)
    magnitude = torch.empty(_BAND, columns, dtype=torch.int8)
    bits, products = torch.empty(_BAND, columns, dtype=torch.int16), torch.empty(_BAND, columns)
    start = 0
    while start < rows:
        stop = min(rows, start + _BAND - (row + start) % _BAND)  # to the end of a band, and so within a row of blocks
        n = stop - start
        bits[:n].copy_(stored[start:stop]).bitwise_left_shift_(7).bitwise_and_(_SIGN_AND_MAGNITUDE)
        products[:n].copy_(bits[:n].view(torch.float16)).mul_(by_column[(row + start) // BLOCK])
        # a maximum, because torch's reductions of truth values are twenty times as slow
        if torch.bitwise_and(stored[start:stop], 0x7F, out=magnitude[:n]).max() == 0x7F:
            products[:n].masked_fill_(magnitude[:n] == 0x7F, torch.nan)
        out[start:stop] = products[:n]
        start = stop
    return out
