"""The stitch of a run: maps that stand in for the removed layers are fitted once and folded into the pruned model.

The maps are kept in a file of the run folder, because a resumed run with LoRA imports the source's weights again.
"""

from pathlib import Path

from torch import Tensor

from megaprune.importance import stitch
from megaprune.mcore import parallel
from megaprune.mcore.fold import fold
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.context import RunContext
from megaprune.selection.segments import cuts
from megaprune.utils.disk import one_line
from megaprune.utils.files import whole_file
from megaprune.utils.progress import say
from megaprune.weights.byte_ranges import Buffer
from megaprune.weights.reader import TensorFiles
from megaprune.weights.stored_layout import Place
from megaprune.weights.writer import write_safetensors


def fit_stitch(run: RunContext, model: PipelineModel) -> None:
    """Fit a map for each cut on the calibration windows, of which the last quarter is held out, and write the maps.
    Collective.

    Args:
        model: the model that the layers are removed from.
    """
    arch, count, data = run.options.model.arch, run.options.selection.calibration_samples, run.data
    held_out, size, found = max(1, count // 4), arch.transformer["hidden_size"], dict[int, Tensor]()
    batches = data.calibration_batches(count - held_out), data.calibration_batches(held_out, count - held_out)
    for first, last in cuts(run.kept_layers, arch.num_layers):
        if first == 0:
            say("stitch: there is no layer before the cut at layer 0, so nothing is folded")
            continue
        with run.progress.timed("stitch", count * run.options.data.seq_length):
            fit, rest = (stitch.moments(model, part, first - 1, last, size) for part in batches)
            share = parallel.on_rank0_for_all(lambda: _fitted(found, first - 1, fit, rest))  # noqa: B023
        say(f"stitch: layers {first} to {last}, folded into layer {first - 1}; held-out error x {share:.3f}")
    parallel.on_rank0(lambda: _write(run.options.output.run_dir.stitch, found))
    parallel.barrier()


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


def _fitted(found: dict[int, Tensor], before: int, fit: stitch.Moments, held_out: stitch.Moments) -> float:
    """Add the map of a layer, and return the share of the held-out error that it leaves."""
    found[before], share = stitch.fitted(fit, held_out)
    return share


def _write(path: Path, maps: dict[int, Tensor]) -> None:
    shapes = {str(layer): (tuple(change.shape), "F32") for layer, change in maps.items()}
    with one_line(path.parent), whole_file(path) as aside:
        write_safetensors(aside, shapes, maps.values())


def _read(path: Path) -> dict[int, Tensor]:
    files = TensorFiles()
    files.check(path)
    names = files.names(path)
    return {int(name): files.read(path, Place(name), files.describe(path, name)[1], Buffer()) for name in names}
