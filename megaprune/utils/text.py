"""Text for terminals: first lines of error messages, tables."""

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the name of the class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".: ") if text else type(error).__name__


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with columns of equal width, the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
