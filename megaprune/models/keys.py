"""Check that every key of config.json is understood: read by the family, or without effect on the model's output."""

import re
from collections.abc import Collection, Iterator
from typing import Any

from megaprune.models.settings import HFConfig
from megaprune.utils.errors import MegapruneError

# Keys about files, libraries, generation, initialization and training, in families of names. Dropout is not among
# what changes a model: training here has none.
_NEUTRAL = re.compile(
    "|".join(
        (
            r"_.*|unsloth_.*|.*_token_id|.*_token_index|.*_init(ializer)?_(range|std|method)|init(ializer)?_.*",
            r"(architectures|auto_map|custom_pipelines|model_type|transformers_version|torch_dtype|dtype|torchscript)",
            r"(quantization_config|compression_config|quantization|use_bfloat16|use_cache|cache_implementation)",
            r"(output|return)_.*|use_return_dict|tokenizer_.*|model_max_length|max_length|min_length|max_new_tokens",
            r".*dropout.*|.*_pdrop|drop_path_rate|.*aux_loss.*|router_z_loss.*|router_jitter_noise|seq_aux|z_loss.*",
            r"temperature|top_[kp]|typical_p|do_sample|early_stopping|num_beam.*|diversity_penalty|length_penalty",
            r"repetition_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids|num_return_sequences|prefix|suppress_tokens",
            r"begin_suppress_tokens|exponential_decay_length_penalty|remove_invalid_values|forced_.*",
            r"(id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|pruned_heads|name_or_path)",
            r"is_decoder|chunk_size_feed_forward|pretraining_tp|ep_size|gradient_checkpointing.*|neftune_noise_alpha",
            r"(bos|eos|pad)_token|keys_to_ignore_at_inference|attn_implementation|use_flash_attention.*|use_flash_attn",
            r"use_fused_.*|transformers\.js_config|zero3_init_flag|fim_.*|chat_template|language|license|tags",
        )
    )
)


class ReadConfig(dict[str, Any]):
    """Config that records which keys are read."""

    def __init__(self, config: HFConfig) -> None:
        super().__init__(config)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or the default."""
        self.read.add(key)
        return super().get(key, default)

    def edited(self, changes: HFConfig, without: Collection[str] = ()) -> "ReadConfig":
        """Return a changed copy; what is read of it counts as read here."""
        copy = ReadConfig({key: value for key, value in self.items() if key not in without} | changes)
        copy.read = self.read
        return copy

    def unread(self) -> Iterator[str]:
        """Yield the keys that were not read and switch something on."""
        for key, value in self.items():
            if key not in self.read and not _is_off(value):
                yield key


def edited(config: HFConfig, changes: HFConfig, without: Collection[str] = ()) -> HFConfig:
    """Return a changed copy of a config, of which reading is recorded if it is for the config."""
    return (config if isinstance(config, ReadConfig) else ReadConfig(config)).edited(changes, without)


def check_understood(config: ReadConfig) -> None:
    """Check that nothing in a config is ignored, after the family has read it.

    Raises:
        MegapruneError: a key was not read and may change the model.
    """
    for key in config.unread():
        if not _NEUTRAL.fullmatch(key):
            shown = repr(config[key])
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise MegapruneError(
                f"{config.get('model_type')}: {key!r} in config.json is {shown}, a setting that is not known here: "
                "remove it if the model does not depend on it"
            )


def _is_off(value: Any) -> bool:
    """Return whether a setting switches nothing on: null, false or empty."""
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)
