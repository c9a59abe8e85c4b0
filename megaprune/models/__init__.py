"""One file per family of models. A new family is a new file here, listed below, and nothing else."""

from megaprune.errors import MegapruneError
from megaprune.models import llama, qwen2, qwen3
from megaprune.models.tables import Architecture, Family, HFConfig, Shard, WeightRule

FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in (llama, qwen2, qwen3)}

__all__ = ["FAMILIES", "Architecture", "Family", "HFConfig", "Shard", "WeightRule", "family_of"]


def family_of(config: HFConfig) -> Family:
    """The family that an HF config names.

    Raises:
        MegapruneError: the family is not known; names it and lists the known ones.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise MegapruneError(
            f"model_type {model_type!r} is not a family that megaprune knows; known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]
