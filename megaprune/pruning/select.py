"""The choice of the layers that stay: by calibration data, by the user, or, beside the training, by a search."""

from collections.abc import Sequence

import torch

from megaprune.data.batches import Batch
from megaprune.distillation.teachers import Teacher
from megaprune.importance.auto import HELD_OUT_WINDOWS, choose_automatically, num_windows
from megaprune.importance.evaluator import Judge
from megaprune.importance.methods import Choice, choose_layers
from megaprune.mcore.builder import in_half_precision
from megaprune.mcore.optimizer import Trainer
from megaprune.pruning.context import RunContext
from megaprune.pruning.data import Data
from megaprune.pruning.models import Models
from megaprune.pruning.options import RunOptions, SelectionOptions
from megaprune.pruning.train import search
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.one_shot import random_layers


class Calibration:
    """Evaluates the original model without some of its layers on a run's calibration data."""

    def __init__(self, options: RunOptions, data: Data, models: Models, model: torch.nn.Module) -> None:
        self._options, self._data, self._models, self._model = options, data, models, model

    def judge(self, num_windows: int | None = None, skip: int = 0) -> Judge:
        """Return an evaluator on so many windows behind the first `skip`; by default, on all calibration samples."""
        selection = self._options.selection
        count = selection.calibration_samples if num_windows is None else num_windows

        def windows(count: int, behind: int) -> Sequence[Batch]:
            return self._data.calibration_batches(count, skip + behind)

        return Judge(self._model, self._models.gate, windows, count, selection.budget, self._models.shard)

    def initial_scores(self) -> tuple[list[float], int]:
        """Return the scores that a search starts from, and the tokens that they cost."""
        selection, judge = self._options.selection, self.judge()
        kl = judge.without_each(selection.protected)
        scores = scores_from_kl(kl, selection.protected, selection.search.init_scale, selection.budget.costs)
        return scores.tolist(), judge.tokens

    def choose(self) -> Choice:
        """Return the choice of a method that looks at calibration data."""
        selection = self._options.selection
        if selection.method == "auto":
            return self._choose_automatically()
        return choose_layers(
            selection.method,
            self.judge(),
            selection.budget,
            selection.protected,
            selection.search.init_scale,
            selection.seed,
            selection.gradient_steps,
            selection.criterion,
        )

    def _choose_automatically(self) -> Choice:
        selection = self._options.selection
        count = num_windows(
            selection.budget,
            selection.protected,
            selection.auto_tokens,
            self._options.data.seq_length,
            asked=selection.auto_tokens_given,
        )
        most = min(selection.calibration_samples, self._data.num_calibration_windows // (1 + HELD_OUT_WINDOWS))
        count = max(1, min(count, most))
        held_out, judge = self.judge(HELD_OUT_WINDOWS * count, skip=count), self.judge(count)
        return choose_automatically(
            judge, held_out, selection.budget, selection.protected, selection.auto_tokens, selection.seed
        )


def select(run: RunContext) -> tuple[Trainer | None, Teacher | None]:
    """Choose the layers that stay.

    Returns:
        What recovery can go on with: the searched student if it keeps its pruned layers, and the teacher.
    """
    searching, models = run.options.selection.searches, run.models
    if not searching and not _needs_original(run):
        run.progress.kept_layers = _named_layers(run.options.selection)
        return None, None
    original = None
    if run.resume_from is None:
        with run.progress.timed("import"):
            original = models.original()
        _measure_original(run, original)
    if not searching:
        return None, None if models.student_stays_whole else models.teacher(None, original)
    student = models.whole_student(original, run.saved_weights())
    teacher = models.teacher(student)
    search(run, student, teacher)
    return (student if models.student_stays_whole else None), teacher


def _needs_original(run: RunContext) -> bool:
    """Whether a method without a search has a use for the original model."""
    options = run.options
    taught = options.distillation.teaches and options.distillation.teacher != "cached"
    return taught or bool(run.valid) or options.training.stitches or options.selection.calibrated


def _measure_original(run: RunContext, original: torch.nn.Module) -> None:
    """Measure the model's validation loss and, where they are wanted, its layers' scores."""
    options, progress, selection = run.options, run.progress, run.options.selection
    model = in_half_precision(original, options.engine)
    run.validate("teacher", model)
    calibration = Calibration(options, run.data, run.models, model)
    if selection.method == "e3":
        with progress.timed("importance"):
            progress.scores, tokens = calibration.initial_scores()
        progress.spend("importance", 0.0, tokens)
    elif selection.calibrated:
        with progress.timed("importance"):
            choice = calibration.choose()
        progress.spend("importance", 0.0, choice.tokens)
        progress.kept_layers, progress.scores = choice.kept_layers, choice.scores
        progress.candidates = choice.candidates
    elif not selection.searches:
        progress.kept_layers = _named_layers(selection)
    if options.training.stitches:
        judge, hidden_size = calibration.judge(), options.model.arch.transformer["hidden_size"]
        with progress.timed("importance"):
            progress.stitch = judge.jump_across(run.kept_layers, hidden_size).tolist()
        progress.spend("importance", 0.0, judge.tokens)


def _named_layers(selection: SelectionOptions) -> list[int]:
    """The user's own choice, or the control's."""
    if selection.manual is not None:
        return selection.manual
    return random_layers(selection.budget, selection.protected, selection.seed)
