"""Selection of the layers that stay: by calibration data, by the user, or by a search during training."""

from collections.abc import Sequence

from megaprune.data.batches import Batch
from megaprune.distillation.teachers import Teacher
from megaprune.importance.evaluator import LayerEvaluator
from megaprune.importance.records import Records
from megaprune.mcore.builder import in_half_precision
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.candidates import branches, contenders
from megaprune.pruning.context import RunContext, agreed_layers
from megaprune.pruning.data import Data
from megaprune.pruning.models import Models
from megaprune.pruning.options import RunOptions
from megaprune.pruning.stitch import Cut, fit_stitch
from megaprune.pruning.stitched_choice import choose_stitched
from megaprune.pruning.train import search
from megaprune.selection.initial_scores import check_finite
from megaprune.selection.registry import HELD_OUT_WINDOWS, Choice


class Calibration:
    """Evaluation of the original model without some of its layers, on a run's calibration data.

    Args:
        records: the run's measurements; None keeps them in memory.
    """

    def __init__(
        self, options: RunOptions, data: Data, models: Models, model: PipelineModel, records: Records | None = None
    ) -> None:
        self._options, self._data, self._models, self._model = options, data, models, model
        self._records = Records() if records is None else records

    def evaluator(self, num_windows: int | None = None, skip: int = 0) -> LayerEvaluator:
        """Return an evaluator on a number of windows after the first `skip` ones; by default, on all calibration
        samples.
        """
        selection, models = self._options.selection, self._models
        count = selection.calibration_samples if num_windows is None else num_windows

        def windows(count: int, behind: int) -> Sequence[Batch]:
            return self._data.calibration_batches(count, skip + behind)

        return LayerEvaluator(
            self._model, models.gate, windows, count, selection.budget, models.shard, self._records, skip
        )

    def comparison(self) -> LayerEvaluator:
        """Return a new evaluator, whose windows follow those that the stitch is fitted to as far as there are others,
        and whose measurements are not kept.
        """
        count = self._options.selection.calibration_samples
        skip = max(0, min(count, self._data.num_calibration_windows - count))
        return Calibration(self._options, self._data, self._models, self._model).evaluator(count, skip)

    def initial_kl(self) -> tuple[list[float], int]:
        """Return the KL without each layer, from which a search starts, and its cost in tokens. Protected layers get 0.

        Raises:
            MegapruneError: a KL is not finite.
        """
        selection, evaluator = self._options.selection, self.evaluator()
        kl = evaluator.without_each(selection.protected)
        kl[sorted(selection.protected)] = 0.0
        check_finite(kl, range(len(kl)))
        return kl.tolist(), evaluator.tokens

    def choose(self) -> tuple[Choice, int]:
        """Return the choice of a calibrated method, and its cost in tokens.

        Raises:
            UsageError: the method's token budget is too small.
        """
        selection, held_out = self._options.selection, None
        method, count = selection.method, self._num_windows()
        options = dict(selection.method_options)
        if "selection_budget" in method.flags:
            options["selection_budget"] = selection.token_budget
        evaluator = self.evaluator(count)
        if method.needs_held_out:
            held_out = self.evaluator(HELD_OUT_WINDOWS * count, skip=count)
        choice = method.choose(selection.budget, selection.protected, options, evaluator, held_out)
        agreed_layers(choice.kept_layers, self._options)
        return choice, evaluator.tokens + (held_out.tokens if held_out else 0)

    def _num_windows(self) -> int:
        """Return the number of calibration windows in each pass of the method."""
        selection, method = self._options.selection, self._options.selection.method
        count, seq_length = selection.calibration_samples, self._options.data.seq_length
        if "selection_budget" in method.flags and method.windows is not None:
            budget, protected, tokens = selection.budget, selection.protected, selection.token_budget
            count = min(count, method.windows(budget, protected, tokens, seq_length, selection.token_budget_given))
        if method.needs_held_out:
            count = min(count, self._data.num_calibration_windows // (1 + HELD_OUT_WINDOWS))
        return max(1, count)


def select(run: RunContext) -> tuple[Trainer | None, Teacher | None]:
    """Choose the layers that stay.

    Returns:
        The searched student, if it keeps its pruned layers, and the teacher, for reuse in recovery.
    """
    searching, models = run.options.selection.method.searches, run.models
    if not searching and not _needs_original(run):
        run.progress.kept_layers = _named_layers(run.options)
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
    if models.student_stays_whole:
        return student, teacher
    student.close()  # recovery starts from the checkpoint
    return None, teacher


def _needs_original(run: RunContext) -> bool:
    """Return whether a method without a search needs the original model."""
    options = run.options
    taught = options.distillation.teaches and options.distillation.teacher != "cached"
    return taught or bool(run.valid) or options.training.stitches or options.selection.method.calibrated


def _measure_original(run: RunContext, original: PipelineModel) -> None:
    """Measure the model's validation loss and, if they are needed, its layers' scores."""
    options, progress, selection = run.options, run.progress, run.options.selection
    compared: frozenset[Cut] = frozenset()
    model = in_half_precision(original, options.engine)
    if run.origin is None:
        run.validate("teacher", model)

    def calibration() -> Calibration:
        return Calibration(options, run.data, run.models, model, run.records)

    if selection.method.needs_scores:
        with progress.timed("importance"):
            progress.scores, tokens = calibration().initial_kl()
        progress.spend("importance", 0.0, tokens)
    elif selection.method.calibrated:
        with progress.timed("importance"):
            choice, tokens = calibration().choose()
        progress.spend("importance", 0.0, tokens)
        progress.kept_layers, progress.scores = choice.kept_layers, choice.scores
        progress.candidates = choice.candidates
        if options.training.stitches:
            compared = choose_stitched(run, model, calibration().comparison)
        progress.contenders = contenders(choice.candidates, selection)
    elif not selection.method.searches:
        progress.kept_layers = _named_layers(options)
    if options.training.stitches and not selection.method.searches:
        for each in branches(run):
            fit_stitch(each, model, compared if each is run else frozenset())


def _named_layers(options: RunOptions) -> list[int]:
    """Return the choice of a method that uses no data."""
    selection = options.selection
    if selection.manual is not None:
        return selection.manual
    choice = selection.method.choose(selection.budget, selection.protected, selection.method_options)
    return agreed_layers(choice.kept_layers, options)
