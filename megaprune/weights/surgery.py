"""Removal of layers by renaming tensors. No model is built, and no value changes."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megaprune.models import HFConfig
from megaprune.utils import stopping
from megaprune.weights.beside import files_beside
from megaprune.weights.quantized import without_quantization
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import ShardWriter, WrittenShard, file_numbers, finish_shards, num_bytes


def write_pruned_weights(
    source: TensorSource, kept_layers: Sequence[int], folder: Path, max_shard_bytes: int, keep_mtp: bool = True
) -> None:
    """Copy every kept tensor bit for bit, or dequantized, under its new name, in the layout of the source."""
    layout = source.pruned_layout(kept_layers, keep_mtp)
    finish_shards(folder, write_share(source, kept_layers, folder, max_shard_bytes, keep_mtp), layout, max_shard_bytes)


def write_share(
    source: TensorSource,
    kept_layers: Sequence[int],
    folder: Path,
    max_shard_bytes: int,
    keep_mtp: bool = True,
    writer: int = 0,
    num_writers: int = 1,
) -> list[WrittenShard]:
    """Write one of the shares of `write_pruned_weights`, and return its files for `finish_shards`.

    Args:
        writer: the number of the share; the writers take the files in turn.
    """
    shards, layout = ShardWriter(folder, max_shard_bytes, writer), source.pruned_layout(kept_layers, keep_mtp)
    renamed = [(name, source.renamed(name, kept_layers, keep_mtp)) for name in source.names]
    kept = [(name, layout.written_name(new_name)) for name, new_name in renamed if new_name is not None]
    sizes = (num_bytes((source.shape(name), source.dtype_name(name))) for name, _ in kept)
    last = writer
    for (name, new_name), number in zip(kept, file_numbers(sizes, max_shard_bytes), strict=True):
        if stopping.is_due("export"):
            break  # the ranks stop together, and discard what is written
        if number % num_writers != writer:
            continue
        if number != last:
            shards.close()
            last = number
        ranges = None if source.is_quantized(name) else source.ranges(name)
        if ranges is None:
            shards.add(new_name, source.read(name))
        else:
            shards.add_ranges(new_name, source.shape(name), source.dtype_name(name), ranges)
    return shards.close()


def write_pruned_config(source: TensorSource, kept_layers: Sequence[int], folder: Path, keep_mtp: bool = True) -> None:
    """Write config.json, edited from the source's JSON, and copy the other files that are valid for the result:
    tokenizer, generation config, chat template.
    """
    pruned = source.family.prune_config(source.config, kept_layers)
    # readers use 1 if the count is absent
    pruned = source.family.with_mtp(pruned, len(source.mtp_layers) if keep_mtp else 0)
    write_config(without_quantization(pruned), folder)
    copy_beside(source.folder, folder)


def write_config(config: HFConfig, folder: Path) -> None:
    """Write config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def copy_beside(source_folder: Path, folder: Path) -> None:
    """Copy the files beside config and weights that are valid for the result too: tokenizer, generation config, chat
    templates, code, license.
    """
    for path in files_beside(source_folder):
        target = folder / path.relative_to(source_folder)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
