"""Choice among the best candidates of a selection by a few iterations of recovery of each (`--heal-candidates`).

Each candidate is a run in a folder of its own, with checkpoints of its own, so that an interrupted choice goes on where
it stopped and one candidate at a time is in memory. The best one goes on as the run itself, with its weights and the
state of its optimizer; the iterations of the others count as the run's.
"""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from megaprune.distillation.teachers import Teacher
from megaprune.importance.measures import mean_loss
from megaprune.mcore import checkpoint, parallel
from megaprune.pruning.context import RunContext
from megaprune.pruning.options import RunOptions, SelectionOptions
from megaprune.pruning.train import begin_recovery, heal
from megaprune.report.metrics import read_metrics
from megaprune.utils.disk import one_line
from megaprune.utils.progress import say

# A candidate whose KL is higher than the best by this factor does not catch up.
CLOSE = 1.5
# The share of the removed layers by which contenders differ at least, so that they are worth a comparison.
_DIFFERENCE = 0.15
# Windows on which the trained candidates are compared, if the iterations that follow have so many.
_WINDOWS = 64


def contenders(candidates: Sequence[Mapping[str, Any]], selection: SelectionOptions) -> list[list[int]]:
    """Return the kept layers of the best candidates, by their loss with a stitch where it was measured and then by KL,
    that are close to the best one in KL and differ from each other; none if there is nothing to compare, or no
    iteration for it.
    """
    if not selection.heal_iters:
        return []
    found: list[list[int]] = []
    ranked = sorted(
        candidates,
        key=lambda candidate: (candidate.get("stitched_loss", math.inf), candidate["kl"], not candidate["chosen"]),
    )
    lowest = min((candidate["kl"] for candidate in candidates), default=0.0)
    for candidate in ranked:
        kept = candidate["kept_layers"]
        apart = max(1, round(_DIFFERENCE * (selection.budget.num_layers - len(kept))))
        if candidate["kl"] <= CLOSE * lowest and all(len(set(other) - set(kept)) >= apart for other in found):
            found.append(kept)
    return found[: selection.heal_candidates] if len(found) > 1 else []


def branches(run: RunContext) -> Iterator[RunContext]:
    """Yield the run of each contender, to be saved before its training; the run itself if there are none."""
    if not run.progress.contenders:
        yield run
    for number in range(len(run.progress.contenders)):
        with closing(_branch(run, number)) as branch:
            yield branch
            branch.save_state()


def choose_healed(run: RunContext, teacher: Teacher | None) -> Teacher | None:
    """Train each contender for a few iterations, and let the run go on with the one of the lowest loss on the windows
    that follow in the training data. Collective.

    Returns:
        The teacher, for reuse in recovery.
    """
    options, progress = run.options, run.progress
    if progress.contenders:
        if run.resume_from is None:
            run.save_state()
        shared = not run.models.student_stays_whole and options.distillation.loss != "ce"
        if teacher is None and shared:
            teacher = run.models.teacher(None)
        for number, kept in enumerate(progress.contenders):
            entry = progress.candidate(kept)
            if "healed_loss" not in entry:
                entry["healed_loss"] = _healed_loss(run, number, teacher)
                run.save_state()
        _go_on_with_best(run)
    _discard(options)
    return teacher


def _branch(run: RunContext, number: int) -> RunContext:
    """Return the run of a contender, which is resumed if it has begun."""
    folder, others = run.options.output.run_dir.candidates / str(number), len(run.progress.contenders) - 1

    def make() -> None:
        with one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)

    parallel.on_rank0(make)
    branch = run.branch(folder, others * run.options.selection.heal_iters)
    branch.progress.kept_layers = run.progress.contenders[number]
    return branch


def _healed_loss(run: RunContext, number: int, teacher: Teacher | None) -> float:
    """Train a contender, and return its loss."""
    with closing(_branch(run, number)) as branch:
        options = branch.options
        say(f"candidate {number + 1} of {len(run.progress.contenders)}")
        student, until = begin_recovery(branch, None), options.selection.heal_iters
        heal(branch, student, teacher, until)
        count = max(1, min(until, -(-_WINDOWS // options.training.global_batch_size)))
        with run.progress.timed("comparison", count * options.tokens_per_iteration):
            batches = [batch for i in range(until, until + count) for batch in branch.data.train_batches(i)]
            loss = mean_loss(student.ddp, batches, branch.models.shard)
        student.close()
    say(f"candidate {number + 1}: loss {loss:.4f} after {until} iterations")
    return loss


def _go_on_with_best(run: RunContext) -> None:
    """Turn the run into that of the best contender, with the others' iterations and time added, and save it."""
    progress, others = run.progress, (len(run.progress.contenders) - 1) * run.options.selection.heal_iters
    losses = [progress.candidate(kept)["healed_loss"] for kept in progress.contenders]
    best = losses.index(min(losses))
    progress.choose(progress.contenders[best])
    for number in range(len(progress.contenders)):
        _add_stages(run, number, number == best)
    with closing(_branch(run, best)) as branch:
        student = begin_recovery(branch, None)
        progress.iteration, progress.kept_layers = branch.progress.iteration, branch.kept_layers
        progress.pruned, progress.stitched = branch.progress.pruned, branch.progress.stitched
        progress.valid |= branch.progress.valid
        progress.contenders, progress.other_iterations = [], others
        parallel.on_rank0(lambda: take_files(run, branch.options.output.run_dir.path))
        checkpoint.save(run.options.output.run_dir.checkpoints, progress.iteration, student, progress.state())
        student.close()
    run.resume_from = run.latest_checkpoint()
    run.shorten(others)


def _add_stages(run: RunContext, number: int, chosen: bool) -> None:
    """Add the time and the tokens of a contender's run: under their names if it was chosen, else as comparison."""
    with closing(_branch(run, number)) as branch:
        stages = branch.progress.stages
    for name, spent in stages.items():
        run.progress.spend(name if chosen else "comparison", spent["seconds"], int(spent["tokens"]))


def take_files(run: RunContext, folder: Path) -> None:
    """Take the records and the maps of the contender that was chosen."""
    tokens = run.progress.other_iterations * run.options.tokens_per_iteration
    for record in read_metrics(folder):
        run.metrics.log(record | {"tokens": record["tokens"] + tokens})
    name = run.options.output.run_dir.stitch.name
    with one_line(folder):
        if (folder / name).exists():
            shutil.copyfile(folder / name, run.options.output.run_dir.path / name)


def _discard(options: RunOptions) -> None:
    """Remove the contenders' runs."""
    folder = options.output.run_dir.candidates
    parallel.on_rank0(lambda: shutil.rmtree(folder, ignore_errors=True))
