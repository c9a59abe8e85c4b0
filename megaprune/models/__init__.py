"""One file per model family. A new family is a new file, listed below."""

from megaprune.models import (
    block_sparse_moe,
    deepseek_v3,
    gemma3,
    glm4_moe,
    gpt_oss,
    llama,
    mistral,
    nested,
    olmo,
    pangu_embedded,
    pangu_ultra_moe,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
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
    deepseek_v3.GLM4_MOE_LITE,
    deepseek_v3.DEEPSEEK_V32,
    deepseek_v3.GLM_MOE_DSA,
    glm4_moe.FAMILY,
    *block_sparse_moe.FAMILIES,
    *mistral.FAMILIES,
    phi3.FAMILY,
    smollm3.FAMILY,
    olmo.OLMO2,
    olmo.OLMO3,
    gemma3.FAMILY,
    gpt_oss.FAMILY,
    pangu_embedded.FAMILY,
    pangu_ultra_moe.FAMILY,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}
# Language models within multimodal ones.
_NESTED = (
    nested.nested_family(
        "kimi_k25",
        {"kimi_k2": deepseek_v3.KIMI_K2, "deepseek_v3": deepseek_v3.FAMILY},
        prefix="language_model.",
        other_tensors=(r"^vision_tower\.", r"^(model\.)?mm_projector\."),
    ),
    nested.nested_family(
        "mistral3",
        {name: FAMILIES[name] for name in ("mistral", "ministral3")},
        prefix="language_model.",
        other_tensors=(r"^vision_tower\.", r"^multi_modal_projector\."),
    ),
)
FAMILIES |= {family.model_type: family for family in _NESTED}
# Families that are asked for, with what is missing.
_MISSING = {
    "gemma3": "only Gemma 3's text models (gemma3_text) are, because its text_config leaves out sizes",
}

__all__ = ["FAMILIES", "Architecture", "Family", "HFConfig", "RopeScaling", "WeightRule", "family_of"]


def family_of(config: HFConfig) -> Family:
    """Return the family that an HF config names.

    Raises:
        MegapruneError: the family is unknown (the message lists the known ones), the config nests a text model's
        config, or it
            does not say whether embeddings are tied.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _MISSING:
        raise MegapruneError(f"model_type {model_type!r} is not supported: {_MISSING[model_type]}")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MegapruneError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    if config.get("text_config") is not None and FAMILIES[model_type].text_key is None:
        raise MegapruneError(
            f"{model_type}: config.json holds a text_config, as multimodal models do: only text models are supported"
        )
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise MegapruneError(f"{model_type}: 'tie_word_embeddings' in config.json is {tied!r}, not true or false")
    return FAMILIES[model_type]
