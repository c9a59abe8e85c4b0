"""Mistral's dense models: Mistral (``mistral``), Ministral 8B (``ministral``), Ministral 3 (``ministral3``).

The first has a sliding window in all layers or none, the second by layer; in the third, queries grow with their
position.
"""

from collections.abc import Sequence
from dataclasses import replace

from megaprune.models.gqa import dense_layer_rules, gqa_architecture
from megaprune.models.settings import HFConfig, is_number, whole, wrong
from megaprune.models.tables import MODEL_RULES, Architecture, Family, QueryGrowth
from megaprune.models.windows import windows_by_type, windows_everywhere

_POSITIONS = 4096 * 32
_GROWTH, _LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"


def _mistral(config: HFConfig) -> Architecture:
    return gqa_architecture(config, _POSITIONS, groups=8, **windows_everywhere(config, default=4096))


def _ministral(config: HFConfig) -> Architecture:
    return gqa_architecture(config, _POSITIONS, groups=8, **windows_by_type(config))


def _ministral3(config: HFConfig) -> Architecture:
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(rope, dict):
        raise wrong(config, "rope_parameters", rope, "a mapping, which this family needs")
    arch = gqa_architecture(
        config,
        max_positions=262144,
        head_dim=128,
        groups=8,
        also_about_rope=(_GROWTH, "max_position_embeddings"),
        **windows_everywhere(config, default=None),
    )
    beta = rope.get(_GROWTH)
    if beta is None or not is_number(beta) or beta < 0:
        raise wrong(config, _GROWTH, beta, "a number that is not negative")
    return replace(arch, query_growth=QueryGrowth(beta, whole(rope | {"model_type": "ministral3"}, _LENGTH)))


FAMILIES: Sequence[Family] = tuple(
    Family(model_type=name, describe=describe, model_rules=MODEL_RULES, layer_rules=dense_layer_rules)
    for name, describe in (("mistral", _mistral), ("ministral", _ministral), ("ministral3", _ministral3))
)
