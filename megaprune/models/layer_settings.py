"""Settings of config.json that concern single layers, and how they follow the removal of layers.

There are four kinds. Lists with an entry per layer keep the entries of the kept layers. Lists of layer numbers are
numbered anew. Counts of the first layers of a kind count the kept ones. A rule of the layer's number ("every fourth
layer") is replaced by the list that it stands for, if it does not hold for the pruned model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megaprune.models.settings import HFConfig, wrong
from megaprune.utils.errors import MegapruneError

# Lists with an entry per layer. A family reads what it understands; `models.keys` refuses the others.
PER_LAYER = (
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "attn_type_list",
    "indexer_types",
    "sliding_window_pattern",
)

# Older names of layer_types, as transformers reads them (remap_legacy_layer_types). A pruned config keeps its source's.
_OLDER_TYPES = {"attention": "full_attention", "deepseek_sparse_attention": "indexed_attention"}


@dataclass(frozen=True)
class LayerRule:
    """A rule by which config.json describes layers through their numbers.

    Args:
        key: the list with an entry per layer that says the same, and that readers prefer.
        entries: the entries that readers assume for a config without the list.
        stated_by: keys of the rule, which are removed where the list replaces it.
    """

    key: str
    entries: Callable[[HFConfig], Sequence[Any]]
    stated_by: tuple[str, ...] = ()


def per_layer(config: HFConfig, key: str, num_layers: int, allowed: Sequence[Any]) -> Sequence[Any] | None:
    """Return a list with an entry per layer, under their present names; None where the key is absent or null.

    Args:
        allowed: the entries that are understood.

    Raises:
        MegapruneError: the key holds something else, or another number of entries.
    """
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(type(entry) in (str, int) for entry in value):
        raise wrong(config, key, value, "a list with an entry per layer")
    if key == "layer_types":
        value = [_OLDER_TYPES.get(entry, entry) for entry in value]
    unknown = next((entry for entry in value if entry not in allowed), None)
    if unknown is not None:
        raise MegapruneError(
            f"{config.get('model_type')}: {key} in config.json names {unknown!r}, which is not supported, only "
            + " and ".join(map(repr, allowed))
        )
    if len(value) != num_layers:
        raise MegapruneError(
            f"{config.get('model_type')}: {key!r} in config.json names {len(value)} layers, but the model has "
            f"{num_layers}"
        )
    return value


def prune_layer_settings(
    config: HFConfig,
    kept: Sequence[int],
    *,
    prefixes: Sequence[str] = (),
    rules: Sequence[LayerRule] = (),
) -> HFConfig:
    """Return the config of the kept layers.

    Args:
        kept: source indices, ascending.
        prefixes: keys that count the first layers of a kind.
        rules: rules of the layer's number that hold for the source.
    """
    pruned = dict(config, num_hidden_layers=len(kept))
    for key in PER_LAYER:
        if isinstance(config.get(key), list):
            pruned[key] = [config[key][layer] for layer in kept]
    for key in prefixes:
        if config.get(key) is not None:
            pruned[key] = sum(layer < config[key] for layer in kept)
    for rule in rules:
        if isinstance(config.get(rule.key), list):
            entries = pruned[rule.key]
        else:
            source = rule.entries(config)
            entries = [source[layer] for layer in kept]
        if list(rule.entries({**pruned, rule.key: None})) != entries:
            pruned[rule.key] = entries
            for key in rule.stated_by:
                pruned.pop(key, None)
    return pruned
