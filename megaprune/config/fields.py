"""Fields of configuration dataclasses: a help text and bounds beside each default."""

from collections.abc import Callable, Iterable
from dataclasses import Field, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Bounds:
    """The values that a number may have; every bound is optional, and every number must be finite.

    Args:
        least: the smallest value.
        above: the value must be larger.
        most: the largest value.
        below: the value must be smaller.
        between: the value lies between these two, neither included.
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
    **bounds: Any,
) -> Any:
    """Return a dataclass field with its help text and the bounds of its value (see `Bounds`).

    Args:
        help: the text, or a function that gives it when `--help` is printed.
        choices: gives the values to choose from, where they aren't a Literal's.
        loads: called with the values before other settings are looked at, as their choices may follow from it.
    """
    metadata: dict[str, Any] = {"help": help, "bounds": Bounds(**bounds), "loads": loads}
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
