"""INT4 weights as compressed-tensors packs them (Kimi-K2 Thinking).

An int32 contains eight numbers of a row. Each group of columns of a row has a scale.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PER_WORD = 8
_BITS, _MASK, _OFFSET = 4, 0xF, 8
_BAND = 256  # rows at a time, so that what is unpacked stays small


def dequantize(
    packed: torch.Tensor, scale: torch.Tensor, group: int, column: int = 0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a matrix, or a part of one, in bf16: each number times the scale of its group.

    Args:
        packed: [rows, columns / 8] int32; the lowest bits contain the first column. Numbers are stored plus 8.
        scale: [rows, groups], of the whole rows.
        group: columns in a group.
        column: the column of the matrix at which the part begins, a multiple of 8.
        out: the result, [rows, columns] bf16; allocated if not given.
    """
    import torch

    rows, columns = packed.shape[0], packed.shape[1] * PER_WORD
    out = torch.empty(rows, columns, dtype=torch.bfloat16) if out is None else out
    shifts = torch.arange(0, PER_WORD * _BITS, _BITS, dtype=torch.int32)
    of_column = (torch.arange(columns) + column) // group
    for start in range(0, rows, _BAND):
        band = slice(start, min(rows, start + _BAND))
        words = (packed[band].unsqueeze(-1) >> shifts) & _MASK  # which drops the sign that is shifted in
        numbers = (words - _OFFSET).flatten(1).float()
        out[band] = numbers.mul_(scale[band].float()[:, of_column])
    return out
