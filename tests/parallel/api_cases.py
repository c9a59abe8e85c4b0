"""The Python API on several processes: every rank calls, and every rank gets the same result."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

import megaprune
from megaprune.utils.files import write_json


def calls(flags: dict[str, Any], scoring: dict[str, Any], folder: str) -> None:
    """Call each function at least twice in one process group; write rank 0's results to ``folder/reports.json``."""
    out = Path(folder)
    megatron, hf, cut = (out / name for name in ("megatron", "hf", "cut"))
    wrong = flags | {"num_layers_to_prune": 99}
    reports = {
        "refused": _refusal(lambda: megaprune.prune(**wrong, save=out / "refused")),
        "prune": megaprune.prune(**flags, save=out / "run").to_dict(),
        "again": megaprune.prune(**flags, save=out / "run").to_dict(),
        "scores": megaprune.score_layers(**scoring).to_dict(),
        "imported": megaprune.import_hf(flags["hf_model"], megatron).to_dict(),
        "exported": megaprune.export_hf(megatron, hf).to_dict(),
        "cut": megaprune.remove_layers(flags["hf_model"], [1, 2], cut).to_dict(),
        "exists": _refusal(lambda: megaprune.remove_layers(flags["hf_model"], [1, 2], cut)),
        "loaded": _refusal(lambda: megaprune.import_hf(flags["hf_model"], megatron)),
    }
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, reports)
    assert all(found == reports for found in everyones), everyones
    if dist.get_rank() == 0:
        write_json(out / "reports.json", reports)


def _refusal(call: Any) -> list[str]:
    try:
        call()
    except megaprune.MegapruneError as error:
        return [type(error).__name__, str(error)]
    raise AssertionError("not refused")
