"""Text for people: first lines of errors, columns of tables."""

from collections.abc import Sequence


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or its class where it has none."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".: ") if text else type(error).__name__


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of equal columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
