"""RoPE's settings, read from config.json as transformers reads them: one reader for all families.

There are two spellings: ``rope_theta`` beside ``rope_scaling``, and transformers 5's ``rope_parameters``, which holds
both. A ``rope_scaling`` that is not empty replaces ``rope_parameters`` as a whole, its theta included.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaprune.models.keys import edited
from megaprune.models.settings import HFConfig, is_number, whole, wrong
from megaprune.utils.errors import MegapruneError

_THETA = 10000.0  # transformers' default for every family here
_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LENGTH = "original_max_position_embeddings"
# by type, the keys that it reads beside the common ones
_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", _LENGTH},
    "yarn": {"factor", _LENGTH, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
}
# Settings of other code for YaRN, which transformers ignores. DeepSeek-R1-0528-Qwen3-8B has the first.
_IGNORED = {"attn_factor", "finetuned"}
# at the top of config.json
_READ = {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
_ABOUT_ROPE = re.compile(r"(rope|rotary|partial_rotary|yarn|mrope)_")


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of RoPE's inverse frequencies. Fields that a type does not read are None.

    Args:
        rope_type: ``linear``, ``llama3`` or ``yarn``.
        attention_factor: factor of cosine and sine.
        mscale_all_dim: in multi-head latent attention, the softmax scale is multiplied by the square of
            ``0.1 * mscale_all_dim * ln(factor) + 1``; 0 leaves it unchanged.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0


def read_rope(
    config: HFConfig,
    max_positions: int,
    also_read: tuple[str, ...] = (),
    theta: float | None = _THETA,
    partial: bool = False,
) -> tuple[float, RopeScaling | None]:
    """Return RoPE's theta and scaling.

    Args:
        max_positions: positions of the model; used as the original number of positions if that is absent.
        also_read: keys of config.json about RoPE that the family itself reads, at its top or among RoPE's settings.
        theta: the family's default; None if it has none.
        partial: whether the family may rotate a part of each head's dimensions; the caller reads how many.

    Raises:
        MegapruneError: a setting is missing, of a wrong type, or not implemented; the message names it.
    """
    rope = _settings(config, also_read, partial)
    theta = _theta(config, rope, theta)
    rope_type = rope["rope_type"] if "rope_type" in rope else rope.get("type", "default")
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        raise MegapruneError(
            f"{config.get('model_type')}: RoPE scaling {rope_type!r} is not supported, only "
            + ", ".join(map(repr, sorted(_KEYS)))
        )
    _check_keys(config, {key: value for key, value in rope.items() if key not in also_read}, rope_type)
    if rope_type == "default":
        return theta, None
    if rope_type == "linear":
        return theta, RopeScaling("linear", _positive(config, rope, "factor"))
    length = _original_length(config, rope, max_positions)
    return theta, (_llama3 if rope_type == "llama3" else _yarn)(config, rope, length, max_positions)


def partial_rotary(config: HFConfig, channels: int, default: float, scaling: RopeScaling | None) -> int:
    """Return the number of a head's dimensions that RoPE rotates: the first ones.

    Args:
        channels: dimensions of a head.
        default: the share of them if config.json does not say it.

    Raises:
        MegapruneError: the share is wrong, or does not go with the scaling.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    where = rope if "partial_rotary_factor" in rope else config
    share = where.get("partial_rotary_factor", default)
    if not is_number(share) or not 0 < share <= 1:
        raise wrong(config, "partial_rotary_factor", share, "a number above 0 and at most 1")
    rotated = int(channels * share)
    if rotated % 2 or not rotated:
        raise MegapruneError(
            f"{config.get('model_type')}: partial_rotary_factor {share} of {channels} dimensions is {rotated}, but "
            "RoPE needs an even number of them"
        )
    if rotated < channels and scaling is not None and scaling.attention_factor != 1:
        raise MegapruneError(
            f"{config.get('model_type')}: partial_rotary_factor {share} with RoPE scaling {scaling.rope_type!r} is not "
            "supported: the scaling multiplies cosine and sine, and so a part of each head only"
        )
    return rotated


def read_rope_by_type(
    config: HFConfig,
    max_positions: int,
    types: Mapping[str, float],
    full: str,
    theta_keys: Mapping[str, str] | None = None,
) -> dict[str, tuple[float, RopeScaling | None]]:
    """Return theta and scaling for each type of layer.

    The settings are transformers 5's ``rope_parameters`` by type, or ``rope_theta`` and ``rope_scaling`` for the type
    `full`, and the defaults for others.

    Args:
        types: theta's default for each type.
        full: the type that reads the settings without a type.
        theta_keys: keys at the top of config.json with theta of the other types.

    Raises:
        MegapruneError: a setting is missing, of a wrong type, or not implemented; the message names it.
    """
    by_type = config.get("rope_parameters") or {}
    if not isinstance(by_type, dict) or not all(value is None or isinstance(value, dict) for value in by_type.values()):
        raise wrong(config, "rope_parameters", by_type, "a mapping from the types of layers to their settings")
    unknown = sorted(set(by_type) - set(types))
    if unknown:
        raise wrong(config, "rope_parameters", unknown[0], "a type of layer (" + " or ".join(types) + ")")
    found, keys = {}, {full: "rope_theta"} | dict(theta_keys or {})
    for kind, theta in types.items():
        own, theta_key = dict(by_type.get(kind) or {}), keys.get(kind)
        if kind == full:
            own |= config.get("rope_scaling") or {}
        outside = {"rope_theta": config[theta_key]} if theta_key and config.get(theta_key) is not None else {}
        plain = edited(config, outside | {"rope_parameters": own}, {"rope_scaling", "rope_theta", *keys.values()})
        found[kind] = read_rope(plain, max_positions, theta=theta)
    return found


def _settings(config: HFConfig, also_read: tuple[str, ...], partial_allowed: bool) -> dict[str, Any]:
    name = config.get("model_type")
    for key in config:
        if _ABOUT_ROPE.match(str(key)) and key not in (*_READ, *also_read) and config[key] is not None:
            raise MegapruneError(f"{name}: {key!r} in config.json is not supported: transformers does not read it")
    for key in ("rope_scaling", "rope_parameters"):
        if config.get(key) is not None and not isinstance(config[key], dict):
            raise MegapruneError(f"{name}: {key} {config[key]!r} in config.json is not a mapping")
    for key in (*_READ, _LENGTH):
        config.get(key)  # one spelling replaces the other, so that not all of them matter
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for key, value in rope.items():
        if isinstance(value, dict):
            raise MegapruneError(f"{name}: RoPE settings per layer type ({key!r} in config.json) are not supported")
    if partial_allowed:
        return rope
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    absent = partial is None and "partial_rotary_factor" not in rope
    if not absent and not (is_number(partial) and partial == 1):
        raise MegapruneError(f"{name}: partial_rotary_factor {partial!r} is not supported, only 1.0")
    return rope


def _theta(config: HFConfig, rope: dict[str, Any], default: float | None) -> float:
    where = rope if "rope_theta" in rope else config
    if "rope_theta" not in where and default is None:
        raise MegapruneError(f"{config.get('model_type')}: config.json lacks the key 'rope_theta'")
    theta = where.get("rope_theta", default)
    if theta is None or not is_number(theta) or theta <= 1:
        raise wrong(config, "rope_theta", theta, "a number above 1")
    return float(theta)


def _check_keys(config: HFConfig, rope: dict[str, Any], rope_type: str) -> None:
    ignored = _IGNORED if rope_type == "yarn" else set()
    for key in rope:
        if key in ignored:
            warnings.warn(f"{key} of RoPE's YaRN scaling is ignored, as transformers ignores it", stacklevel=2)
        elif key not in _COMMON | _KEYS[rope_type] and rope[key] is not None:
            raise MegapruneError(
                f"{config.get('model_type')}: RoPE scaling {rope_type!r} with the key {key!r} is not supported: "
                "transformers does not read it"
            )


def _original_length(config: HFConfig, rope: dict[str, Any], max_positions: int) -> int:
    """Return the context length before scaling. The key at the top of config.json goes before RoPE's own setting."""
    if _LENGTH in config:
        return whole(config, _LENGTH)
    if _LENGTH in rope:
        return whole(rope | {"model_type": config.get("model_type")}, _LENGTH)
    return max_positions


def _llama3(config: HFConfig, rope: dict[str, Any], length: int, max_positions: int) -> RopeScaling:
    factor, low, high = (_positive(config, rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise MegapruneError(
            f"{config.get('model_type')}: RoPE's high_freq_factor {high} must be greater than low_freq_factor {low}"
        )
    return RopeScaling("llama3", factor, low, high, length)


def _yarn(config: HFConfig, rope: dict[str, Any], length: int, max_positions: int) -> RopeScaling:
    mscale, mscale_all_dim = (_optional(config, rope, key) for key in ("mscale", "mscale_all_dim"))
    if "factor" in rope and rope["factor"] is None:
        if mscale_all_dim and config.get("kv_lora_rank") is not None:
            raise wrong(config, "factor", None, "a positive number (mscale_all_dim needs it)")
        factor = max_positions / length
    else:
        factor = _positive(config, rope, "factor")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise wrong(config, "truncate", truncate, "true or false")
    if rope.get("attention_factor") is not None:
        attention_factor = _positive(config, rope, "attention_factor")
    elif mscale and mscale_all_dim:
        attention_factor = yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim)
    else:
        attention_factor = yarn_mscale(factor, 1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=length,
        beta_fast=_optional(config, rope, "beta_fast") or 32,
        beta_slow=_optional(config, rope, "beta_slow") or 1,
        truncate=truncate,
        attention_factor=attention_factor,
        mscale_all_dim=mscale_all_dim,
    )


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's attention temperature for a context that is extended by ``factor``."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _positive(config: HFConfig, rope: dict[str, Any], key: str) -> float:
    if key not in rope:
        rope_type = rope.get("rope_type", rope.get("type"))
        raise MegapruneError(f"{config.get('model_type')}: RoPE scaling {rope_type!r} lacks the key {key!r}")
    if not is_number(rope[key]) or rope[key] <= 0:
        raise wrong(config, key, rope[key], "a positive number")
    return rope[key]


def _optional(config: HFConfig, rope: dict[str, Any], key: str) -> float:
    """Return a number of at least 0; 0 if it is absent or null."""
    value = rope.get(key)
    if value is None:
        return 0.0
    if not is_number(value) or value < 0:
        raise wrong(config, key, value, "a number that is not negative")
    return value
