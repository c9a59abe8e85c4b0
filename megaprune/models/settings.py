"""Checked access to config.json: a value is of its type and within its bounds, or one line names the key."""

from collections.abc import Sequence
from typing import Any

from megaprune.utils.errors import MegapruneError

HFConfig = dict[str, Any]
REQUIRED: Any = object()
_HUGE = 2**63


def whole(config: HFConfig, key: str, default: Any = REQUIRED, least: int = 1) -> int:
    """An integer of at least ``least``; ``default`` if the key is absent.

    Raises:
        MegapruneError: the key is absent and has no default, or holds something else.
    """
    value = _lookup(config, key, default)
    if value is default:
        return value
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < _HUGE:
        raise wrong(config, key, value, f"an integer of at least {least}")
    return value


def whole_or_none(config: HFConfig, key: str, default: Any = REQUIRED, least: int = 1) -> int | None:
    """An integer of at least ``least``, or None where the key holds null; ``default`` if the key is absent.

    Raises:
        MegapruneError: the key is absent and has no default, or holds something else.
    """
    return None if key in config and config[key] is None else whole(config, key, default, least)


def number(config: HFConfig, key: str, default: Any = REQUIRED) -> float:
    """A finite number above 0; ``default`` if the key is absent.

    Raises:
        MegapruneError: the key is absent and has no default, or holds something else.
    """
    value = _lookup(config, key, default)
    if not is_number(value) or value <= 0:
        raise wrong(config, key, value, "a positive number")
    return value


def flag(config: HFConfig, key: str, default: bool) -> bool:
    """A boolean; ``default`` if the key is absent.

    Raises:
        MegapruneError: the key holds something else.
    """
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise wrong(config, key, value, "true or false")
    return value


def text(config: HFConfig, key: str, default: str, only: str) -> None:
    """Check that a setting has the only supported value; ``default`` if the key is absent.

    Raises:
        MegapruneError: it has another.
    """
    if (value := config.get(key, default)) != only:
        raise MegapruneError(f"{config.get('model_type')}: {key} {value!r} is not supported, only {only!r}")


def whole_list(config: HFConfig, key: str) -> Sequence[int]:
    """A list of integers from 0; empty where the key is absent or null.

    Raises:
        MegapruneError: the key holds something else.
    """
    value = config.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(entry) is int and entry >= 0 for entry in value):
        raise wrong(config, key, value, "a list of layer numbers")
    return value


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; true and false are none."""
    # NaN and infinity are not below it, and an integer may be too large for a float
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _HUGE


def wrong(config: HFConfig, key: str, value: Any, expected: str) -> MegapruneError:
    """Return the error that names a key, its value, and the expected kind of value."""
    shown = repr(value) if len(repr(value)) <= 80 else repr(value)[:77] + "..."
    return MegapruneError(f"{config.get('model_type')}: {key!r} in config.json is {shown}, not {expected}")


def _lookup(config: HFConfig, key: str, default: Any) -> Any:
    if key in config:
        return config[key]
    if default is REQUIRED:
        raise MegapruneError(f"{config.get('model_type')}: config.json lacks the key {key!r}")
    return default
