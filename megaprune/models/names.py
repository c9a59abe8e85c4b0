"""Layer and expert numbers in tensor names: the one place that parses and rewrites them.

HF names hold ``model.layers.N.``, Megatron-Core's ``decoder.layers.N.`` and, of experts, ``.local_experts.N.`` (local
layers) or ``.experts.linear_fc1.weightN`` (Transformer Engine's). Layers and experts count from 0.
"""

import re
from collections.abc import Callable, Sequence

BASE_PREFIX = "model."
_HF_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")
_MEGATRON_LAYER = re.compile(r"((?:^|\.)decoder\.layers\.)(\d+)(?=\.)")
_HF_EXPERT = re.compile(r"(?<=\.experts)\.\d+")
_LOCAL_EXPERT = re.compile(r"(\.local_experts\.)(\d+)(?=\.)")
_GROUPED_EXPERT = re.compile(r"(\.experts\.linear_fc[12]\.(?:weight|bias))(\d+)$")
_EXPERT_KEY = re.compile(r"^(.+\.mlp\.experts)\.local_experts\.(\d+)\.(linear_fc[12]\.(?:weight|bias))$")
_ADAPTER = re.compile(r"\.lora_[ab]$")
_OF_BASE = re.compile(r"^(layers\.\d+\.|embed_tokens\.|norm\.)")


def hf_layer(name: str) -> int | None:
    """Return the layer that an HF tensor belongs to; None outside the layers."""
    match = _HF_LAYER.match(name)
    return int(match[2]) if match else None


def hf_name(layer: int, name: str) -> str:
    """Return the HF name of a tensor, given its name within the layer."""
    return f"model.layers.{layer}.{name}"


def name_in_layer(name: str) -> str:
    """Return the name of an HF tensor or module within its layer; names outside the layers are returned unchanged."""
    match = _HF_LAYER.match(name)
    return match[3][1:] if match else name


def name_in_every_layer(name: str) -> str:
    """The HF name of a tensor without the numbers of its layer and expert."""
    return _HF_EXPERT.sub("", name_in_layer(name))


def renumbered(name: str, kept_layers: Sequence[int]) -> str | None:
    """The HF name of a tensor after pruning; None where its layer is removed."""
    layer = hf_layer(name)
    if layer is None:
        return name
    if layer not in kept_layers:
        return None
    return hf_name(list(kept_layers).index(layer), name_in_layer(name))


def is_of_base_model(name: str) -> bool:
    """Return whether an HF name is one of a base model, which lacks the prefix ``model.``."""
    return bool(_OF_BASE.match(name))


def is_adapter(name: str) -> bool:
    """Return whether a Megatron name is that of an adapter's parameter."""
    return bool(_ADAPTER.search(name))


def with_layer(name: str, number: Callable[[int], int]) -> str:
    """A Megatron name with another layer number; a name outside the layers as it is.

    Args:
        number: gives the new number for the old one.
    """
    return _MEGATRON_LAYER.sub(lambda match: f"{match[1]}{number(int(match[2]))}", name, count=1)


def source_name(name: str, kept_layers: Sequence[int] | None) -> str:
    """The Megatron name in the source model of a pruned model's parameter.

    Args:
        kept_layers: source layers that the pruned model consists of; None means all.
    """
    return name if kept_layers is None else with_layer(name, lambda layer: kept_layers[layer])


def with_expert(name: str, number: Callable[[int], int]) -> str:
    """Return a Megatron name with another expert number; a name without a routed expert is returned unchanged."""
    for pattern in (_LOCAL_EXPERT, _GROUPED_EXPERT):
        name = pattern.sub(lambda match: f"{match[1]}{number(int(match[2]))}", name)
    return name


def without_expert(name: str) -> str:
    """Return a Megatron name without the number of a local expert, which is the same for all experts of a layer."""
    return re.sub(r"\.local_experts\.\d+", "", name)


def expert_key(name: str) -> tuple[str, int] | None:
    """Return the checkpoint key that the routed experts of a layer share, and the expert's number; None for other
    names.
    """
    match = _EXPERT_KEY.match(name)
    return (f"{match[1]}.experts.{match[3]}", int(match[2])) if match else None


def in_mtp_layer(key: str, number: int) -> str:
    """The checkpoint key of a parameter in a multi-token-prediction layer's transformer layer.

    Args:
        key: the parameter's key in a layer of the decoder.
    """
    return re.sub(r"^decoder\.layers\.\d+\.", f"{mtp_prefix(number)}transformer_layer.", key)


def mtp_prefix(number: int) -> str:
    """Return the prefix of the checkpoint keys of a multi-token-prediction layer."""
    return f"mtp.layers.{number}."
