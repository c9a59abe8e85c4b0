"""Layer removal as a renaming of tensors: no model is built, no number changes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megaprune.models import HFConfig
from megaprune.weights.source import HFSource
from megaprune.weights.writer import ShardWriter, finish_shards

_TEMPLATES = "additional_chat_templates"
_BESIDE = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".spm", ".vocab", ".bpe")


def write_pruned_weights(
    source: HFSource, kept_layers: Sequence[int], folder: Path, max_shard_bytes: int, keep_mtp: bool = True
) -> None:
    """Copies every tensor that stays, bit for bit (FP8 dequantised), under its new name."""
    writer = ShardWriter(folder, max_shard_bytes)
    for name in source.names:
        new_name = source.renamed(name, kept_layers, keep_mtp)
        if new_name is not None:
            writer.add(new_name, source.read(name))
    finish_shards(folder, writer.close())


def write_pruned_config(source: HFSource, kept_layers: Sequence[int], folder: Path, keep_mtp: bool = True) -> None:
    """Writes config.json, edited from the source's own JSON, and copies what else the folder holds but the weights:
    tokenizer, generation config, chat template."""
    pruned = source.family.prune_config(source.config, kept_layers)
    # readers take an absent count for 1
    pruned |= dict.fromkeys(source.family.mtp_keys, len(source.mtp_layers) if keep_mtp else 0)
    pruned.pop("quantization_config", None)  # block FP8 was dequantised
    write_config(pruned, folder)
    copy_beside(source.folder, folder)


def write_config(config: HFConfig, folder: Path) -> None:
    """Writes config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_beside(source_folder: Path, folder: Path) -> None:
    """Copies what an HF folder holds beside config and weights: tokenizer, generation config, chat template, code."""
    for path in sorted(source_folder.iterdir()):
        if path.is_file() and _belongs_beside(path):
            shutil.copyfile(path, folder / path.name)
    templates = source_folder / _TEMPLATES
    if templates.is_dir():
        shutil.copytree(templates, folder / _TEMPLATES, dirs_exist_ok=True)


def _belongs_beside(path: Path) -> bool:
    # an index of the source names files that the result does not have, in either format of weights
    if path.name in ("config.json", "README.md") or path.name.endswith(".index.json") or path.name.startswith("."):
        return False
    return path.suffix in _BESIDE or path.name.startswith("LICENSE")
