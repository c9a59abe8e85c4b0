"""The verb `plan`: the plan of a run, from the flags of the run and the number of processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.cli.parser import parse_flags
from megaprune.config.checks import check_for_plan
from megaprune.config.fields import flag, required
from megaprune.config.schema import ALTERNATIVES, GROUPS, Config
from megaprune.utils.errors import UsageError


@dataclass
class PlanConfig:
    """Flags of `plan` in addition to those of the run."""

    _argument_group_name = "plan"
    world_size: int = required("number of processes in the cluster, one per accelerator", least=1)
    device_memory_gib: float | None = flag(
        "memory of an accelerator in GiB; the plan then reports the stages that do not fit", above=0
    )
    output: str | None = flag("write the plan to this JSON file")


def run(argv: Sequence[str], command: str = "") -> None:
    """Print the plan, and write it to ``--output`` if given.

    Raises:
        MegapruneError: the model can't be expressed.
        UsageError: the flags don't fit each other, the model or the processes.
    """
    description = "Compute the layers, parameters and memory of every rank of a run, without weights or accelerators."
    *groups, settings = parse_flags(argv, (*GROUPS, PlanConfig), "plan.py", description, ALTERNATIVES)
    config = Config(*groups)
    check_for_plan(config)
    _check(settings)
    # Imported here, so that --help and wrong flags are answered before megatron loads.
    from megaprune.planning.plan import make_plan
    from megaprune.planning.table import plan_record, plan_text
    from megaprune.utils.files import write_json

    plan = make_plan(config, _hf_config(config), settings.world_size)
    print(plan_text(plan, settings.device_memory_gib), flush=True)
    if settings.output:
        write_json(settings.output, plan_record(plan, settings.device_memory_gib))
        print(f"\nwritten to {settings.output}", flush=True)


def _hf_config(config: Config) -> dict[str, Any]:
    """Return the model's config; if the stored tensors are at hand, they decide whether embeddings are tied."""
    from megaprune.models import family_of
    from megaprune.weights.hub import resolve_hf_model
    from megaprune.weights.source import HFSource, holds_weights, read_hf_config
    from megaprune.weights.torch_dist.import_hf import HF_FOLDER
    from megaprune.weights.torch_dist.source import CheckpointSource

    model = config.model
    folder = Path(model.load) / HF_FOLDER if model.load else resolve_hf_model(model.given, config_only=True)
    found = read_hf_config(folder)
    if not family_of(found).ties(found):
        return found
    if model.load:
        return CheckpointSource(model.load).config if (Path(model.load) / ".metadata").is_file() else found
    return HFSource(folder).config if holds_weights(folder) else found


def _check(settings: PlanConfig) -> None:
    if settings.output and Path(settings.output).is_dir():
        raise UsageError(f"--output {settings.output} is a folder: give the name of a JSON file")
