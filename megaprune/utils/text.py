"""Text for people: first lines of errors, ranges of numbers, columns of tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, or the name of the class if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".: ") if text else type(error).__name__


def number_ranges(numbers: Iterable[int], separator: str = ", ") -> str:
    """Return [0, 1, 2, 5], in any order, as "0-2, 5"; "none" for no numbers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return separator.join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with columns of equal width, the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(cells))
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def call_text(function: str, arguments: Mapping[str, Any]) -> str:
    """Return a call of the Python API as a user would write it, for the model card."""
    return f"megaprune.{function}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"
