"""The stitch of a run: maps that stand in for the removed layers are fitted once and folded into the pruned model.

The maps are kept in a file of the run folder, because a resumed run with LoRA imports the source's weights again.
"""

from collections.abc import Sequence, Set
from pathlib import Path

import torch
from torch import Tensor

from megaprune.importance import stitch
from megaprune.mcore import parallel
from megaprune.mcore.fold import fold
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.context import RunContext
from megaprune.selection.segments import cuts
from megaprune.utils.disk import one_line
from megaprune.utils.errors import RunStopped
from megaprune.utils.files import whole_file
from megaprune.utils.progress import say
from megaprune.weights.byte_ranges import Buffer
from megaprune.weights.reader import TensorFiles
from megaprune.weights.stored_layout import Place
from megaprune.weights.writer import write_safetensors

# The first and the last layer of a cut.
Cut = tuple[int, int]
# The number of the finished steps among the sums of an unfinished pass.
_STEPS = -1


def fit_stitch(run: RunContext, model: PipelineModel, compared: Set[Cut] = frozenset()) -> None:
    """Fit a map for each cut on the calibration windows, of which the last quarter is held out, and write the maps.
    Collective. Maps that an interrupted run or a choice among masks has fitted are read.

    Args:
        model: the model that the layers are removed from.
        compared: cuts whose maps and tokens belong to the choice of the layers.

    Raises:
        RunStopped: the run was asked to stop.
    """
    found: list[Path] = []
    for first, last in cuts(run.kept_layers, run.options.model.arch.num_layers):
        if first == 0:
            say("stitch: there is no layer before the cut at layer 0, so nothing is folded")
            continue
        path, share = fit_cut(run, model, (first, last), "stitch", counted=(first, last) not in compared)
        found.append(path)
        say(f"stitch: layers {first} to {last}, folded into layer {first - 1}; held-out error x {share:.3f}")

    def write() -> None:
        maps = {layer: change for path in found for layer, change in read_numbered(path).items()}
        _write(run.options.output.run_dir.stitch, maps)

    parallel.on_rank0(write)
    parallel.barrier()


def fit_cut(run: RunContext, model: PipelineModel, cut: Cut, stage: str, counted: bool = True) -> tuple[Path, float]:
    """Fit the map of a cut, unless this was done. Collective.

    Args:
        cut: the first and the last layer that are removed.
        stage: the stage of the run that the time belongs to.
        counted: whether the tokens belong to it, too.

    Returns:
        The file of the map, and the share of the held-out error that the map leaves.
    """
    first, last = cut
    path, key = run.options.output.run_dir.stitch_parts / f"{_name(run, cut)}-map.safetensors", f"stitch {first}-{last}"
    if not parallel.on_rank0_for_all(path.exists):
        run.records.forget(key)

    def measure() -> list[float]:
        fit, rest = _moments(run, model, cut)

        def fitted() -> float:
            change, share = stitch.fitted(fit, rest)
            _write(path, {first - 1: change})
            return share

        return [parallel.on_rank0_for_all(fitted)]

    tokens = run.options.selection.calibration_samples * run.options.data.seq_length
    with run.progress.timed(stage, tokens if counted else 0):
        [share] = run.records.once(key, measure, f"after it fitted the stitch of layers {first} to {last}")
    return path, share


def _name(run: RunContext, cut: Cut) -> str:
    return f"{run.records.scope}-{cut[0]}-{cut[1]}"


def _moments(run: RunContext, model: PipelineModel, cut: Cut) -> tuple[stitch.Moments, stitch.Moments]:
    """Return the moments of a cut on the windows to fit and on those that are held out. Collective."""
    count, data, sizes = run.options.selection.calibration_samples, run.data, run.options.sizes
    held_out, size = max(1, count // 4), run.options.model.arch.transformer["hidden_size"]
    path, before, last = run.options.output.run_dir.stitch_parts / _name(run, cut), cut[0] - 1, cut[1]
    fitting, resting = (UnfinishedSums(path.with_name(f"{path.name}-{part}"), sizes) for part in ("fit", "rest"))
    fit = stitch.moments(model, data.calibration_batches(count - held_out), before, last, size, fitting)
    try:
        batches = data.calibration_batches(held_out, count - held_out)
        return fit, stitch.moments(model, batches, before, last, size, resting)
    except RunStopped:
        fitting.save()
        raise


class UnfinishedSums:
    """Each rank's sums of a pass that was stopped, in a file of its own, for the same parallel layout.

    Args:
        path: of the files, without their endings.
    """

    def __init__(self, path: Path, sizes: ParallelSizes) -> None:
        layout = f"{sizes.tensor}x{sizes.pipeline}x{parallel.data_parallel_size()}"
        self._path = path.with_name(f"{path.name}.{layout}.rank{parallel.rank()}.safetensors")
        self._reached: tuple[int, Sequence[Tensor]] = 0, []

    def load(self) -> tuple[int, list[Tensor]] | None:
        """Return the finished steps and the sums; None unless all ranks have them."""
        found = read_numbered(self._path) if self._path.exists() else {}
        steps = int(found.pop(_STEPS)) if found else None
        if any(other != steps for other in parallel.all_gather_objects(steps)) or steps is None:
            return None
        sums = [found[number] for number in sorted(found)]
        self._reached = steps, sums
        return steps, sums

    def save_if_asked(self, steps: int, sums: Sequence[Tensor]) -> None:
        """Save the sums and stop, if a rank was asked to stop."""
        self._reached = steps, sums
        try:
            parallel.stop_if_asked("stitch", "while it fits the stitch")
        except RunStopped as stop:
            self.save()
            stop.progressed = True
            raise

    def save(self) -> None:
        """Save the sums that the pass has reached. Collective."""
        steps, sums = self._reached
        saved = {_STEPS: torch.tensor([steps], dtype=torch.float64)} | dict(enumerate(each.cpu() for each in sums))
        parallel.together(lambda: _write(self._path, saved))


def fold_stitch(run: RunContext, student: Trainer) -> None:
    """Fold the maps into the pruned model, unless its weights contain them already, and measure it. Collective."""
    first_time, adapters = not run.progress.stitched, run.options.lora is not None
    if not (first_time or adapters):
        return
    kept = run.kept_layers
    maps = {kept.index(layer): change for layer, change in read_numbered(run.options.output.run_dir.stitch).items()}
    fold(student.model, maps)
    if not adapters:
        student.optimizer.reload_model_params()  # the optimizer's own copies in fp32
    if first_time:
        run.validate("stitched", student.ddp)
    run.progress.stitched = True


def _write(path: Path, tensors: dict[int, Tensor]) -> None:
    names = {torch.float32: "F32", torch.float64: "F64"}
    shapes = {str(number): (tuple(tensor.shape), names[tensor.dtype]) for number, tensor in tensors.items()}
    with one_line(path.parent), whole_file(path) as aside:
        write_safetensors(aside, shapes, tensors.values())


def read_numbered(path: Path) -> dict[int, Tensor]:
    """Return the tensors of a file by their numbers: the maps of cuts by the layer that each is folded into."""
    files = TensorFiles()
    files.check(path)
    names = files.names(path)
    return {int(name): files.read(path, Place(name), files.describe(path, name)[1], Buffer()) for name in names}
