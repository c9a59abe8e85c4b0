"""Block-FP8 weights as DeepSeek-R1 stores them: a float8 matrix and one fp32 scale for each 128 x 128 block of it."""

import torch

BLOCK = 128
SCALE_SUFFIX = "_scale_inv"


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a matrix; its last blocks may be cut short."""
    return tuple(-(-length // BLOCK) for length in shape)


def dequantise(weight: torch.Tensor, scale: torch.Tensor, row: int = 0, column: int = 0) -> torch.Tensor:
    """A matrix, or a part of one, in bf16: each number times the scale of its block.

    Args:
        weight: [rows, columns] float8.
        scale: the whole matrix's scales.
        row: the matrix's row at which the part begins; ``column`` likewise.
    """
    rows, columns = weight.shape
    first_row, first_column = row // BLOCK, column // BLOCK
    part = scale[first_row : -(-(row + rows) // BLOCK), first_column : -(-(column + columns) // BLOCK)]
    # blocks may begin before the part: repeat them in full, then cut
    by_row = part.repeat_interleave(BLOCK, 0)[row % BLOCK :][:rows]
    by_element = by_row.repeat_interleave(BLOCK, 1)[:, column % BLOCK :][:, :columns]
    return weight.float().mul_(by_element).to(torch.bfloat16)
