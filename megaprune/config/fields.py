"""Fields of configuration dataclasses: each has a default, a help text and bounds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The range of a number. Every bound is optional. Every number must be finite.

    Args:
        least: the smallest value.
        above: the value must be larger.
        most: the largest value.
        below: the value must be smaller.
        between: the value must be strictly between these two.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    between: tuple[float, float] | None = None


def flag(
    help: str | Callable[[], str],
    default: Any = None,
    *,
    choices: Callable[[], Iterable[str]] | None = None,
    loads: Callable[[list[str]], None] | None = None,
    sections: Sequence[str] = (),
    **bounds: Any,
) -> Any:
    """Return a dataclass field with its help text and the bounds of its value (see `Bounds`).

    Args:
        help: the text, or a function that returns it when `--help` is printed.
        choices: returns the permitted values, if the type is not a Literal.
        loads: called with the values before other settings are converted, because their choices may depend on it.
        sections: keys of recipes that map fields to values; each becomes an item SECTION.FIELD=VALUE of this list.
    """
    metadata: dict[str, Any] = {"help": help, "bounds": Bounds(**bounds), "loads": loads, "sections": tuple(sections)}
    if choices is not None:
        metadata["choices"] = choices
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def required(help: str, **bounds: Any) -> Any:
    """Return a field that the user must set."""
    return field(metadata={"help": help, "bounds": Bounds(**bounds)})


def bounds_of(setting: Field) -> Bounds:
    """Return the bounds of a field."""
    return setting.metadata.get("bounds", Bounds())


def flag_name(name: str) -> str:
    """Return the flag of a setting: ``train_iters`` becomes ``--train-iters``."""
    return "--" + name.replace("_", "-")
