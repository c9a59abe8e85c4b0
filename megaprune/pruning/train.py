"""The two stages that train: search, in which the layers' scores train together with the weights, and recovery."""

import time

import torch

from megaprune.distillation.hidden_states import WithHiddenStates
from megaprune.distillation.multi_token import WithMTP
from megaprune.distillation.objectives import Objective, make_objective
from megaprune.distillation.teachers import Teacher
from megaprune.mcore.optimizer import Trainer
from megaprune.pruning.context import RunContext, agreed_layers
from megaprune.pruning.step import search_step, train_step
from megaprune.pruning.stitch import fit_stitch, fold_stitch
from megaprune.selection.selector import Selector
from megaprune.utils.errors import RunStopped
from megaprune.utils.progress import say


def search(run: RunContext, student: Trainer, teacher: Teacher | None) -> None:
    """Train the whole model and the layers' scores, and select the layers that stay."""
    training, selection, progress = run.options.training, run.options.selection, run.progress
    method, kl = selection.method, None
    if method.needs_scores:
        # before the first step; a resumed search replaces what it was made of by its state
        kl = torch.tensor(progress.scores)
    selector = method.selector(
        selection.budget, selection.protected, training.search_iters, selection.method_options, kl
    )
    if run.resume_from is not None:
        assert progress.selector is not None  # every checkpoint of a search holds it
        selector.load_state_dict(progress.selector)
    objective = _objective(run, teacher)
    for iteration in range(progress.iteration, training.search_iters):
        start, last = time.perf_counter(), iteration + 1 == training.search_iters
        batches = run.data.train_batches(iteration)
        waited = time.perf_counter() - start
        result = search_step(
            student,
            batches,
            objective,
            iteration,
            selector,
            run.models.gate,
            train_weights=training.trains_weights_in_search,
        )
        progress.selector = selector.state_dict()
        progress.scores = selector.scores.tolist()
        extra = {"temperature": selector.temperature(iteration), "scores": progress.scores}
        run.record(iteration, "search", result, start, extra | run.measured(iteration, result, start, waited, student))
        if last and not training.stitches:
            progress.kept_layers = _searched_layers(run, selector)
        run.save_if_due(student, force=last and not training.stitches)
    if training.stitches:
        _stitch_searched(run, student, _searched_layers(run, selector))


def _searched_layers(run: RunContext, selector: Selector) -> list[int]:
    """Return the layers that a finished search keeps. Collective."""
    selection = run.options.selection
    kept = selection.method.checked(selector.kept_layers(), selection.budget, selection.protected)
    return agreed_layers(kept, run.options)


def _stitch_searched(run: RunContext, student: Trainer, kept: list[int]) -> None:
    """Fit the stitch to the searched model and save both; the search counts as finished when the maps are there."""
    run.progress.kept_layers = kept
    try:
        fit_stitch(run, student.ddp)
    except RunStopped:
        run.progress.kept_layers = None
        run.save(student)
        raise
    run.save(student)


def begin_recovery(run: RunContext, student: Trainer | None) -> Trainer:
    """Return the student without its pruned layers, which are removed or bypassed."""
    kept, saved, options = run.kept_layers, run.saved_weights(), run.options
    if run.models.student_stays_whole:
        say(f"keeping layers {kept}")
        run.models.gate.bypass(set(range(options.model.arch.num_layers)) - set(kept))
        return student or run.models.whole_student(None, saved)
    say(f"keeping layers {kept}, on pipeline stages of {options.pipeline.stages_of_layers(kept)}")
    student = run.models.pruned_student(kept, saved, run.progress.pruned)
    run.progress.pruned = True
    return student


def recover(run: RunContext, student: Trainer, teacher: Teacher | None) -> None:
    """Train the student for the remaining iterations, and measure it before and after."""
    training = run.options.training
    heal(run, student, teacher, training.train_iters)
    if student.average is not None:
        student.average.use()
    if training.changes_weights and not run.options.output.export_adapter:
        run.models.merge_and_round(student, run.kept_layers)
    run.validate("recovered", student.ddp)


def heal(run: RunContext, student: Trainer, teacher: Teacher | None, until: int) -> None:
    """Measure the student, stitch it, and train it up to an iteration."""
    if "pruned" not in run.progress.valid:
        run.validate("pruned", student.ddp)
    if run.options.training.stitches:
        fold_stitch(run, student)
    if run.progress.iteration < until and teacher is None:
        teacher = run.models.teacher(student)
    objective = _recovery_objective(run, student, teacher)
    for iteration in range(run.progress.iteration, until):
        start = time.perf_counter()
        batches = run.data.train_batches(iteration)
        waited = time.perf_counter() - start
        result = train_step(student, batches, objective, iteration)
        run.record(iteration, "recovery", result, start, run.measured(iteration, result, start, waited, student))
        run.save_if_due(student, force=iteration + 1 == until)


def _recovery_objective(run: RunContext, student: Trainer, teacher: Teacher | None) -> Objective:
    """Return the objective, with the loss on hidden states if there is one. Collective."""
    objective, weight = _objective(run, teacher), run.options.distillation.hidden_weight
    if not weight or teacher is None:
        return objective
    return WithHiddenStates(objective, teacher, student.model, run.models.taught_layers(run.kept_layers), weight)


def _objective(run: RunContext, teacher: Teacher | None) -> Objective:
    distillation = run.options.distillation
    shard, num_mtp = run.models.shard, run.options.model.arch.num_mtp
    objective = make_objective(distillation.loss, distillation.tail, shard, teacher, distillation.alpha)
    return WithMTP(objective, shard, num_mtp, distillation.mtp_factor) if num_mtp else objective
