"""Layer removal as a renaming of tensors: no model is built, no number changes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megaprune.models import HFConfig
from megaprune.weights.beside import files_beside
from megaprune.weights.source import HFSource
from megaprune.weights.writer import ShardWriter, finish_shards


def write_pruned_weights(
    source: HFSource, kept_layers: Sequence[int], folder: Path, max_shard_bytes: int, keep_mtp: bool = True
) -> None:
    """Copies every tensor that stays, bit for bit (FP8 dequantised), under its new name, stored as the source is."""
    writer, layout = ShardWriter(folder, max_shard_bytes), source.pruned_layout(kept_layers, keep_mtp)
    for name in source.names:
        new_name = source.renamed(name, kept_layers, keep_mtp)
        if new_name is not None:
            writer.add(layout.written_name(new_name), source.read(name))
    finish_shards(folder, writer.close(), layout, max_shard_bytes)


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
    """Copies what an HF folder holds beside config and weights and what is true of the result too: tokenizer,
    generation config, chat templates, code, license."""
    for path in files_beside(source_folder):
        target = folder / path.relative_to(source_folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
