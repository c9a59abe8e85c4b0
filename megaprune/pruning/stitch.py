"""The stitch of a run: maps that stand in for the removed layers are fitted once and folded into the pruned model.

The maps are kept in a file of the run folder, because a resumed run with LoRA imports the source's weights again.
"""

import shutil
from collections.abc import Sequence
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
from megaprune.pruning.run_dir import RunDir
from megaprune.selection.segments import cuts
from megaprune.utils.disk import one_line
from megaprune.utils.errors import RunStopped
from megaprune.utils.files import whole_file
from megaprune.utils.progress import say
from megaprune.weights.byte_ranges import Buffer
from megaprune.weights.reader import TensorFiles
from megaprune.weights.stored_layout import Place
from megaprune.weights.writer import write_safetensors

# The number of the finished steps among the sums of an unfinished pass.
_STEPS = -1


def fit_stitch(run: RunContext, model: PipelineModel) -> None:
    """Fit a map for each cut on the calibration windows, of which the last quarter is held out, and write the maps.
    Collective. Maps that an interrupted run has fitted are read.

    Args:
        model: the model that the layers are removed from.

    Raises:
        RunStopped: the run was asked to stop.
    """
    run_dir, count = run.options.output.run_dir, run.options.selection.calibration_samples
    stored: dict[int, Tensor] = (
        parallel.on_rank0(lambda: _read(run_dir.stitch) if run_dir.stitch.exists() else {}) or {}
    )
    found: dict[int, Tensor] = {}
    for first, last in cuts(run.kept_layers, run.options.model.arch.num_layers):
        if first == 0:
            say("stitch: there is no layer before the cut at layer 0, so nothing is folded")
            continue
        key = f"stitch {first}-{last}"
        if not parallel.on_rank0_for_all(lambda: first - 1 in stored):  # noqa: B023
            run.records.forget(key)

        def measure() -> list[float]:
            fit, rest = _moments(run, model, first, last)  # noqa: B023

            def fitted() -> float:
                stored[first - 1], share = stitch.fitted(fit, rest)  # noqa: B023
                _write(run_dir.stitch, stored)
                return share

            return [parallel.on_rank0_for_all(fitted)]

        with run.progress.timed("stitch", count * run.options.data.seq_length):
            [share] = run.records.once(key, measure, f"after it fitted the stitch of layers {first} to {last}")
        found |= {first - 1: stored[first - 1]} if stored else {}
        say(f"stitch: layers {first} to {last}, folded into layer {first - 1}; held-out error x {share:.3f}")
    parallel.on_rank0(lambda: _finish(run_dir, found))
    parallel.barrier()


def _moments(run: RunContext, model: PipelineModel, first: int, last: int) -> tuple[stitch.Moments, stitch.Moments]:
    """Return the moments of a cut on the windows to fit and on those that are held out. Collective."""
    count, data, sizes = run.options.selection.calibration_samples, run.data, run.options.sizes
    held_out, size = max(1, count // 4), run.options.model.arch.transformer["hidden_size"]
    path = run.options.output.run_dir.stitch_parts / f"{run.records.scope}-{first}-{last}"
    fitting, resting = (UnfinishedSums(path.with_name(f"{path.name}-{part}"), sizes) for part in ("fit", "rest"))
    fit = stitch.moments(model, data.calibration_batches(count - held_out), first - 1, last, size, fitting)
    try:
        batches = data.calibration_batches(held_out, count - held_out)
        return fit, stitch.moments(model, batches, first - 1, last, size, resting)
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
        found = _read(self._path) if self._path.exists() else {}
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


def _finish(run_dir: RunDir, maps: dict[int, Tensor]) -> None:
    """Write the maps, and remove what interrupted passes have left."""
    _write(run_dir.stitch, maps)
    shutil.rmtree(run_dir.stitch_parts, ignore_errors=True)


def fold_stitch(run: RunContext, student: Trainer) -> None:
    """Fold the maps into the pruned model, unless its weights contain them already, and measure it. Collective."""
    first_time, adapters = not run.progress.stitched, run.options.lora is not None
    if not (first_time or adapters):
        return
    kept = run.kept_layers
    maps = {kept.index(layer): change for layer, change in _read(run.options.output.run_dir.stitch).items()}
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


def _read(path: Path) -> dict[int, Tensor]:
    files = TensorFiles()
    files.check(path)
    names = files.names(path)
    return {int(name): files.read(path, Place(name), files.describe(path, name)[1], Buffer()) for name in names}
