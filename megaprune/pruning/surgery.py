"""Removal of layers from an HF folder, without building a model, an accelerator or process groups."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from megaprune.models.sizes import inventory
from megaprune.report.front_matter import inherited
from megaprune.report.model_card import CARD_NAME, model_card
from megaprune.report.run_report import Report, build_report
from megaprune.selection.one_shot import manual_layers
from megaprune.utils.disk import one_line
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_of, put_in_place
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.torch_dist.engine import on_rank0

# Unused here: no data is read and nothing is sampled. The report shows a run's defaults.
_SEED, _SEQ_LENGTH = 1234, 4096


def remove_layers_of(
    source: TensorSource,
    name: str,
    layers: Sequence[int],
    final: Path,
    keep_mtp: bool,
    max_shard_bytes: int,
    command: str,
) -> Report:
    """Write the model without the given layers, completely or not at all. If there are several ranks, only rank 0
    writes.

    Args:
        name: the model as the user named it.
        command: the call, for the model card.

    Raises:
        MegapruneError: the model can't be read, or the folder is not free or can't be written.
        UsageError: the model does not have one of the layers.
    """
    source.check_tensors()
    arch = source.family.architecture(source.config)
    kept = manual_layers(arch.num_layers, layers)
    report = build_report(
        method="manual",
        num_source_layers=arch.num_layers,
        kept_layers=kept,
        scores=None,
        before=inventory(source.config),
        after=inventory(source.config, kept),
        tokens_seen=0,
        seed=_SEED,
        stages={},
        valid={},
        seq_length=min(_SEQ_LENGTH, arch.max_position_embeddings),
    )
    card = model_card(report, source_name=name, command=command, source_card=inherited(source.folder))

    def write() -> None:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise MegapruneError(f"--save {final} exists: choose another folder")
        aside = aside_of(final)
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with one_line(aside, "call again"):
                aside.mkdir(parents=True)
                write_pruned_weights(source, kept, aside, max_shard_bytes, keep_mtp)
                write_pruned_config(source, kept, aside, keep_mtp)
                (aside / CARD_NAME).write_text(card)
                put_in_place(aside, final)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    on_rank0(write)
    return report
