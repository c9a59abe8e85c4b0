"""Exports by tensor-parallel ranks of which the first one can't write."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

from megaprune.mcore import parallel
from megaprune.mcore.adapters import attach_adapters, export_adapter
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import export_weights, import_weights
from megaprune.mcore.layers.lora import LoRAOptions
from megaprune.mcore.parallel import ParallelSizes
from megaprune.utils.errors import MegapruneError
from megaprune.weights import writer
from megaprune.weights.source import HFSource
from megaprune.weights.writer import write_safetensors
from tests.helpers.disks import full_disk


def full_disk_at_export(hf_model: str, adapter: bool, out: str) -> None:
    """Export when the first rank's disk is full from the first file on. Write each rank's error to ``out``."""
    sizes, source, folder = ParallelSizes(tensor=2), HFSource(hf_model), Path(out)
    arch, lora = source.family.architecture(source.config), LoRAOptions(8, 8.0)
    layers = range(arch.num_layers)
    parallel.initialize(sizes)
    parallel.on_rank0(lambda: folder.mkdir(parents=True))
    built = build_model(arch, [arch.num_layers], EngineOptions(sizes))
    import_weights(built, source)
    try:
        with patch.object(writer, "write_safetensors", _on_full_disk if parallel.rank() == 0 else write_safetensors):
            if adapter:
                attach_adapters(built, lora, seed=1)
                export_adapter(built, source, layers, folder, lora, "base", max_part_bytes=10_000)
            else:
                export_weights(built, source, layers, folder, max_shard_bytes=100_000)
    except MegapruneError as error:
        (folder / f"error.{parallel.rank()}").write_text(str(error))
    else:
        raise AssertionError("the export succeeded")
    parallel.finish()


def _on_full_disk(*args: Any, **options: Any) -> None:
    with full_disk(1000):  # not around the whole export: the ranks of the tests also meet through a file
        write_safetensors(*args, **options)
