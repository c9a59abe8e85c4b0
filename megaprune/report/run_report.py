"""report.json, the record of a run and its results, and the table printed at the end of a run."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megaprune.models.sizes import Inventory
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import strict_json, write_json
from megaprune.utils.text import number_ranges
from megaprune.version import __version__

MODELS = ("teacher", "pruned", "stitched", "recovered")  # the keys of `valid`, in the order of their making
_SHARE = "loss_recovered"
OUTPUTS = (
    ("pruned model", "hf"),
    ("LoRA adapter", "adapter"),
    ("report", "report.json"),
    ("plots", "plots"),
    ("metrics", "metrics.jsonl"),
)


@dataclass(frozen=True)
class Report:
    """The contents of report.json.

    Args:
        kept_layers: source indices, from 0, of the layers in the pruned model; pruned_layers: of the others.
        scores: one per source layer, higher = keep; None if the method does not score single layers.
        layer_kinds_before: number of dense and of MoE layers.
        seq_length: tokens of one training window.
        stages: seconds and tokens of each stage, in the order run.
        valid: validation loss in nats of the teacher, the pruned, the stitched and the recovered model, where measured.
        versions: of the packages that decide the numbers.
        candidates: the alternatives that the method considered, with its measure of each.
        rounds: with `--rounds`, the layers kept after each round, and its tokens and losses.
    """

    method: str
    num_layers: int
    kept_layers: list[int]
    pruned_layers: list[int]
    scores: list[float | None] | None
    params_before: int
    params_after: int
    active_params_before: int
    active_params_after: int
    layer_kinds_before: dict[str, int]
    layer_kinds_after: dict[str, int]
    tokens_seen: int
    seed: int
    seq_length: int
    stages: dict[str, dict[str, float]]
    valid: dict[str, dict[str, float | None]]
    versions: dict[str, str]
    candidates: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as report.json holds it: numbers that are not finite are None."""
        found: dict[str, Any] = json.loads(strict_json(asdict(self)))
        versions, share = found.pop("versions"), loss_recovered(self)
        absent = [name for name in ("candidates", "rounds") if not found[name]]
        found = {name: value for name, value in found.items() if name not in absent}
        return found | ({} if share is None else {_SHARE: share}) | {"versions": versions}


@dataclass(frozen=True)
class LayerScores:
    """The scores of a model's layers.

    Args:
        scores: one per layer, higher = keep; None if the method chooses layers jointly.
        kept_layers: the method's choice, if the call says how much to remove; pruned_layers: the others.
        candidates: the alternatives that the method considered, with its measure of each.
        tokens: cost in tokens that pass forward through all layers.
    """

    method: str
    num_layers: int
    scores: list[float | None] | None
    kept_layers: list[int] | None
    pruned_layers: list[int] | None
    candidates: list[dict[str, Any]]
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as report.json holds them: numbers that are not finite are None."""
        found: dict[str, Any] = json.loads(strict_json(asdict(self)))
        return found


def build_report(
    *,
    method: str,
    num_source_layers: int,
    kept_layers: Sequence[int],
    scores: Sequence[float] | None,
    before: Inventory,
    after: Inventory,
    tokens_seen: int,
    seed: int,
    stages: dict[str, dict[str, float]],
    valid: Mapping[str, dict[str, float | None]],
    seq_length: int,
    candidates: Sequence[dict[str, Any]] = (),
) -> Report:
    """Return the report of a run.

    Args:
        method: the method's name.
        before: the inventory of the source model; `after`: of the pruned model.
        kept_layers: source indices, from 0, of the layers in the pruned model.
        scores: one per source layer, higher = keep; None if the method does not score single layers.
        stages: {name: {"seconds": s, "tokens": n}} in the order run.
        valid: {"loss": nats} of each of `MODELS` that was measured; {} for no `--valid-data`.
        seq_length: tokens of one training window.
        candidates: the alternatives that the method considered, with its measure of each.
    """
    kept = sorted(kept_layers)
    return Report(
        method=method,
        num_layers=len(kept),
        kept_layers=kept,
        pruned_layers=sorted(set(range(num_source_layers)) - set(kept)),
        scores=None if scores is None else list(scores),
        params_before=before.size.total,
        params_after=after.size.total,
        active_params_before=before.size.active,
        active_params_after=after.size.active,
        layer_kinds_before={"dense": before.dense_layers, "moe": before.moe_layers},
        layer_kinds_after={"dense": after.dense_layers, "moe": after.moe_layers},
        tokens_seen=tokens_seen,
        seed=seed,
        seq_length=seq_length,
        stages=stages,
        valid=dict(valid),
        versions=versions(),
        candidates=list(candidates),
    )


def write_report(path: str | Path, report: Report) -> None:
    """Write report.json, whole or not at all; numbers that aren't finite become null."""
    write_json(path, report.to_dict())


def read_report(path: str | Path) -> Report:
    """Return a report as it was written.

    Raises:
        MegapruneError: the file is missing or damaged.
    """
    try:
        found = json.loads(Path(path).read_text())
        return Report(**{name: value for name, value in found.items() if name != _SHARE})  # it follows from `valid`
    except (OSError, ValueError, TypeError) as error:
        raise MegapruneError(
            f"{path} is not a readable report ({error}): remove the run folder to run it again"
        ) from None


def versions() -> dict[str, str]:
    """Return the versions of the packages that determine a run's numbers."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "megatron-core", "transformers")}
    return {"megaprune": __version__, **packages, "python": platform.python_version()}


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if that overflows a float."""
    return math.exp(loss) if loss < 700 else math.inf


def measured_losses(valid: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Return report.json's `valid` as {model: loss in nats}, in order, without losses that aren't finite."""
    losses = {name: valid[name]["loss"] for name in MODELS if name in valid}
    return {name: loss for name, loss in losses.items() if loss is not None and math.isfinite(loss)}


def share_recovered(teacher: float, pruned: float, recovered: float, is_loss: bool = True) -> float | None:
    """Return the share of what pruning cost that recovery gave back: 1 is all, and less than 0 a further loss.

    Args:
        is_loss: whether less is better; more is, for a score.

    Returns:
        (recovered − pruned) / (teacher − pruned), or None if pruning cost nothing or a value isn't finite.
    """
    cost = pruned - teacher if is_loss else teacher - pruned
    if not all(map(math.isfinite, (teacher, pruned, recovered))) or cost <= 0:
        return None
    return (recovered - pruned) / (teacher - pruned)


def loss_recovered(report: Report) -> float | None:
    """Return the share of the loss that recovery gave back; None unless all three losses were measured."""
    losses = measured_losses(report.valid)
    if not {"teacher", "pruned", "recovered"} <= losses.keys():
        return None
    return share_recovered(losses["teacher"], losses["pruned"], losses["recovered"])


def ideal_speedup(report: Report) -> float:
    """Return L / (L - p), the speed-up if all time were spent in layers."""
    return (report.num_layers + len(report.pruned_layers)) / report.num_layers


def result_table(report: Report, run_dir: str | Path | None = None) -> str:
    """Return the plain-text table printed at the end of a run: under 100 columns except for paths.

    Args:
        run_dir: the run's folder; the outputs that exist there are listed with their paths.
    """
    lines = [_headline(report), "", *_model_rows(report), ""]
    facts = [
        *_mixture_facts(report),
        ("kept layers", number_ranges(report.kept_layers)),
        ("pruned layers", number_ranges(report.pruned_layers)),
        ("ideal speed-up", f"{ideal_speedup(report):.2f}x"),
        ("tokens seen", f"{report.tokens_seen:,}"),
    ]
    share = loss_recovered(report)
    if share is not None:
        facts.append(("loss recovered", f"{share:.1%} of what pruning cost"))
    times = ", ".join(f"{name} {stage['seconds']:.1f} s" for name, stage in report.stages.items())
    if times:
        facts.append(("time", times))
    if run_dir is not None:
        found = [(name, Path(run_dir) / place) for name, place in OUTPUTS]
        facts += [(name, str(path)) for name, path in found if path.exists()]
    return "\n".join(lines + [f"{name:<16}{value}" for name, value in facts])


def _headline(report: Report) -> str:
    before = report.num_layers + len(report.pruned_layers)
    return (
        f"{report.method}: {before} -> {report.num_layers} layers, "
        f"{report.params_before:,} -> {report.params_after:,} parameters, seed {report.seed}"
    )


def _mixture_facts(report: Report) -> list[tuple[str, str]]:
    """The change of a model with experts by kind of layer; nothing for a dense model."""
    before, after = report.layer_kinds_before, report.layer_kinds_after
    if not before["moe"]:
        return []
    changes = [f"{before[kind]} -> {after[kind]} {name}" for kind, name in (("dense", "dense"), ("moe", "MoE"))]
    active = f"{report.active_params_before:,} -> {report.active_params_after:,} parameters a token"
    return [("layers", ", ".join(changes)), ("active", active)]


def _model_rows(report: Report) -> list[str]:
    losses = measured_losses(report.valid)
    rows = [f"{'model':<12}{'layers':>8}{'parameters':>20}{'valid loss':>13}{'perplexity':>14}"]
    for name in MODELS if losses else ("teacher", "pruned"):
        if name == "stitched" and name not in losses:
            continue  # made by --stitch alone
        layers, params = report.num_layers, report.params_after
        if name == "teacher":
            layers, params = layers + len(report.pruned_layers), report.params_before
        loss = losses.get(name)
        numbers = ("-", "-") if loss is None else (f"{loss:.4f}", f"{perplexity(loss):,.2f}")
        rows.append(f"{name:<12}{layers:>8}{params:>20,}{numbers[0]:>13}{numbers[1]:>14}")
    return rows
