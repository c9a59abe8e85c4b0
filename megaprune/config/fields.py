"""Fields of configuration dataclasses: a help text and bounds beside each default."""

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


def flag(help: str, default: Any = None, **bounds: Any) -> Any:
    """Return a dataclass field with its help text and the bounds of its value (see `Bounds`)."""
    metadata = {"help": help, "bounds": Bounds(**bounds)}
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
