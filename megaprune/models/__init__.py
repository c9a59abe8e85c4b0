"""One file per family of models. A new family is a new file here, listed below, and nothing else."""

from megaprune.models import deepseek_v3, llama, pangu_ultra_moe, qwen2, qwen3, qwen3_moe
from megaprune.models.rope import RopeScaling
from megaprune.models.settings import HFConfig
from megaprune.models.tables import Architecture, Family, WeightRule
from megaprune.utils.errors import MegapruneError

_ALL = (
    llama.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    deepseek_v3.FAMILY,
    deepseek_v3.KIMI_K2,
    pangu_ultra_moe.FAMILY,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = ["FAMILIES", "Architecture", "Family", "HFConfig", "RopeScaling", "WeightRule", "family_of"]


def family_of(config: HFConfig) -> Family:
    """The family that an HF config names.

    Raises:
        MegapruneError: the family is not known; names it and lists the known ones. Or the config is a text model's
            within another's, or does not say whether embeddings are tied.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MegapruneError(
            f"model_type {model_type!r} is not a family that megaprune knows; known: {', '.join(sorted(FAMILIES))}"
        )
    if config.get("text_config") is not None:
        raise MegapruneError(
            f"{model_type}: config.json holds a text_config, as models of several parts do: only text models are read"
        )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise MegapruneError(
            f"{model_type}: 'tie_word_embeddings' in config.json is {tied!r}, where true or false belongs"
        )
    return FAMILIES[model_type]
