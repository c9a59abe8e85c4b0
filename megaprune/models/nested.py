"""Language models within multimodal ones: config.json nests their config in ``text_config``, and the names of their
tensors have a prefix. Pruning keeps the other parts, such as a vision tower, as they are."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megaprune.models.keys import ReadConfig, check_understood
from megaprune.models.settings import HFConfig, wrong
from megaprune.models.tables import Architecture, Family
from megaprune.utils.errors import MegapruneError

TEXT = "text_config"
_OF_OTHER_PARTS = re.compile(
    r"(vision|media|video|image|mm|projection|projector|multimodal)_.*|ignore_index|spatial_merge_size"
    r"|use_unified_vision_chunk|encoder_only|language_only"
)


def nested_family(model_type: str, families: Mapping[str, Family], prefix: str, other_tensors: Sequence[str]) -> Family:
    """The family of a multimodal model.

    Args:
        model_type: of the whole model.
        families: the families that its language model may be of, by the model type in ``text_config``. They have the
            same weights.
        prefix: what the names of the language model's tensors have in front of a text model's.
        other_tensors: regular expressions of the names of the other tensors.
    """

    def text_of(config: HFConfig) -> HFConfig:
        text = config.get(TEXT)
        if not isinstance(text, dict):
            raise wrong(config, TEXT, text, "a mapping, the config of the language model")
        if text.get("model_type") not in families:
            known = ", ".join(map(repr, families))
            raise MegapruneError(
                f"{model_type}: the model_type {text.get('model_type')!r} in text_config is not supported, only {known}"
            )
        return text | {"tie_word_embeddings": config.get("tie_word_embeddings", True)}

    def describe(config: HFConfig) -> Architecture:
        text = ReadConfig(text_of(config))
        family = families[text["model_type"]]
        arch = family.describe(text)
        text.read.update(family.mtp_keys)
        check_understood(text)
        if isinstance(config, ReadConfig):
            config.read.update(key for key in config if _OF_OTHER_PARTS.fullmatch(key))
        return arch

    def prune_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
        own = config[TEXT]
        pruned = families[own["model_type"]].prune_config(own, kept)
        return {**config, TEXT: pruned}

    one = next(iter(families.values()))
    return replace(
        one,
        model_type=model_type,
        describe=describe,
        prune_config=prune_config,
        prefix=prefix,
        passed=tuple(other_tensors),
        text_key=TEXT,
        tied_by_default=True,
        stacks_experts=True,
        modules_in_transformers=((r"^model\.", "model.language_model."),),
    )
