"""A pruning run, stage by stage: import, importance, search, prune, recover, export. Each goes on where it stopped."""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from megaprune.config.schema import CALIBRATED, SEARCHES, Config
from megaprune.data.batches import Batch, train_batches
from megaprune.distillation.teachers import Teacher
from megaprune.importance.auto import HELD_OUT_WINDOWS, choose_automatically, num_windows
from megaprune.importance.evaluator import Judge
from megaprune.importance.measures import mean_loss
from megaprune.importance.methods import Choice, choose_layers, make_selector
from megaprune.mcore import checkpoint, parallel
from megaprune.mcore.adapters import export_adapter
from megaprune.mcore.builder import in_half_precision
from megaprune.mcore.hf_weights import export_weights
from megaprune.mcore.layers.linear_patch import LinearPatch, strength_at
from megaprune.mcore.optimizer import Trainer
from megaprune.models.sizes import inventory
from megaprune.pruning.models import Models
from megaprune.pruning.prepare import Data, Setup, describe, load_tokenizer, prepare, prepare_data
from megaprune.pruning.progress import Progress
from megaprune.pruning.signals import StopRequest
from megaprune.pruning.step import Objective, StepResult, search_step, train_step
from megaprune.report.metrics import MetricsLogger, read_metrics
from megaprune.report.model_card import CARD_NAME, model_card
from megaprune.report.plots import write_plots
from megaprune.report.run_report import Report, build_report, result_table, write_report
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.one_shot import random_layers
from megaprune.selection.segments import cut_position
from megaprune.utils.disk import one_line
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.files import aside_folder
from megaprune.utils.locks import locked
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from megaprune.weights.writer import parse_size

GO_ON = "give the same command to go on from the last checkpoint"


def run(config: Config, command: str) -> None:
    """Runs what the config asks for, or goes on with it. Collective.

    Args:
        command: the command line, for the model card.

    Raises:
        MegapruneError: what was asked can't be done; nothing was written, or all that was done is in a checkpoint.
    """
    setup = prepare(config)
    if setup.run_dir.hf.exists():
        say(f"{setup.run_dir.path} holds the finished run already: {setup.run_dir.hf}")
        return
    parallel.initialize(setup.sizes)
    tokenizer = load_tokenizer(setup)
    if config.run.dry_run:
        say(describe(setup))
    else:
        undoing = setup.run_dir.undone_if_refused() if parallel.rank() == 0 else nullcontext()
        with locked(setup.run_dir.lock, f"--save {setup.run_dir.path}"), undoing, one_line(setup.run_dir.path, GO_ON):
            parallel.on_first_rank(lambda: setup.run_dir.begin(setup.config))
            pruning_run = PruningRun(setup, prepare_data(setup, tokenizer), command)
            with _closing(pruning_run.metrics):
                pruning_run.execute()
    parallel.finish()


@contextmanager
def _closing(metrics: MetricsLogger) -> Iterator[None]:
    """A block behind which the metrics are closed; where it fails, what closing them meets is not what went wrong."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            metrics.close()
        raise
    metrics.close()


def say(text: str) -> None:
    """Prints on rank 0."""
    if parallel.rank() == 0:
        print(text, flush=True)


class PruningRun:
    """The stages of one run and what they share."""

    def __init__(self, setup: Setup, data: Data, command: str) -> None:
        self.setup, self.data, self.command = setup, data, command
        self.config = setup.config
        self.models = Models(setup, data.teacher_cache)
        self.valid = data.valid_batches()
        self.stop = StopRequest(self.config.run.exit_on_signal)
        self.resume_from = checkpoint.latest(setup.run_dir.checkpoints)
        self.progress = Progress()
        if self.resume_from is not None:
            self.progress = Progress(**checkpoint.load_state(self.resume_from))
            self._check_batch(self.progress.global_batch_size)
            say(f"going on from {self.resume_from}, iteration {self.progress.iteration}")
        self.progress.global_batch_size = setup.global_batch_size
        self.metrics = MetricsLogger(
            setup.run_dir.path,
            enabled=parallel.rank() == 0,
            total_iterations=self.config.recovery.train_iters,
            tokens_per_iteration=setup.tokens_per_iteration,
            log_interval=self.config.run.log_interval,
            tensorboard_dir=self.config.run.tensorboard_dir,
            wandb_project=self.config.run.wandb_project,
            start_iteration=self.progress.iteration,
        )

    def _check_batch(self, begun_with: int | None) -> None:
        """Without --global-batch-size the batch follows the number of replicas, which may be another when resumed."""
        if begun_with not in (None, self.setup.global_batch_size):
            raise UsageError(
                f"--global-batch-size: the run began with {begun_with}, and on these processes it would go on with "
                f"{self.setup.global_batch_size}; give --global-batch-size {begun_with}"
            )

    def execute(self) -> None:
        """Runs the stages that are left."""
        student = teacher = None
        if self.progress.kept_layers is None:
            student, teacher = self._select()
        if self.config.recovery.train_iters > 0 or self.valid:
            student = self._begin_recovery(student)
            self._recover(student, teacher)
        self._export(student)

    # Selection

    def _select(self) -> tuple[Trainer | None, Teacher | None]:
        """Chooses the layers that stay. Returns what recovery can go on with: the searched student if it stays whole,
        and the teacher."""
        searching = self.config.prune.method in SEARCHES
        if not searching and not self._needs_original():
            self.progress.kept_layers = self._named_layers()
            return None, None
        original = None
        if self.resume_from is None:
            with self.progress.timed("import"):
                original = self.models.original()
            self._measure_original(original)
        if not searching:
            return None, None if self.models.student_stays_whole else self.models.teacher(None, original)
        student = self.models.whole_student(original, self._saved_weights())
        teacher = self.models.teacher(student)
        self._search(student, teacher)
        return (student if self.models.student_stays_whole else None), teacher

    def _needs_original(self) -> bool:
        """Whether a method without a search has a use for the original model."""
        taught = self.config.distils and self.config.distillation.teacher != "cached"
        return taught or bool(self.valid) or self.config.stitches or self.config.prune.method in CALIBRATED

    def _measure_original(self, original: torch.nn.Module) -> None:
        """Measures the model's validation loss and, where they are wanted, its layers' scores."""
        model = in_half_precision(original, self.setup.engine)
        self._validate("teacher", model)
        method, setup = self.config.prune.method, self.setup
        if method == "e3":
            judge = self._judge(model, self.config.data.calibration_samples)
            with self.progress.timed("importance"):
                kl = judge.without_each(setup.protected)
            scale = self.config.search.mask_init_scale
            self.progress.scores = scores_from_kl(kl, setup.protected, scale, setup.budget.costs).tolist()
            self.progress.spend("importance", 0.0, judge.tokens)
        elif method in CALIBRATED:
            with self.progress.timed("importance"):
                choice = self._choose(model)
            self.progress.spend("importance", 0.0, choice.tokens)
            self.progress.kept_layers, self.progress.scores = choice.kept_layers, choice.scores
            self.progress.candidates = choice.candidates
        elif method not in SEARCHES:
            self.progress.kept_layers = self._named_layers()
        if self.config.stitches:
            judge = self._judge(model, self.config.data.calibration_samples)
            hidden_size = setup.arch.transformer["hidden_size"]
            with self.progress.timed("importance"):
                self.progress.stitch = judge.jump_across(self.progress.kept_layers, hidden_size).tolist()
            self.progress.spend("importance", 0.0, judge.tokens)

    def _choose(self, model: torch.nn.Module) -> Choice:
        """The choice of a method that looks at calibration data."""
        config, setup = self.config, self.setup
        if config.prune.method != "auto":
            scale, seed = config.search.mask_init_scale, config.recovery.seed
            judge = self._judge(model, config.data.calibration_samples)
            steps, criterion = config.gradient_steps, config.search.criterion
            return choose_layers(
                config.prune.method, judge, setup.budget, setup.protected, scale, seed, steps, criterion
            )
        tokens, count = self._auto_budget()
        held_out = self._judge(model, HELD_OUT_WINDOWS * count, skip=count)
        judge, seed = self._judge(model, count), config.recovery.seed
        return choose_automatically(judge, held_out, setup.budget, setup.protected, tokens, seed)

    def _auto_budget(self) -> tuple[int, int]:
        """The tokens that `auto` may spend, and how many calibration windows each of its passes sees for them.

        Raises:
            UsageError: the budget is too small.
        """
        config, asked = self.config, self.config.search.selection_budget
        # A search's iteration is a forward and a backward pass, which costs two.
        tokens = asked or 3 * config.tenth_of_training * self.setup.tokens_per_iteration
        count = num_windows(
            self.setup.budget, self.setup.protected, tokens, config.data.seq_length, asked=asked is not None
        )
        most = min(config.data.calibration_samples, self.data.num_calibration_windows // (1 + HELD_OUT_WINDOWS))
        return tokens, max(1, min(count, most))

    def _judge(self, model: torch.nn.Module, num_windows: int, skip: int = 0) -> Judge:
        def windows(count: int, behind: int) -> Sequence[Batch]:
            return self.data.calibration_batches(count, skip + behind)

        return Judge(model, self.models.gate, windows, num_windows, self.setup.budget, self.models.shard)

    def _named_layers(self) -> list[int]:
        """The user's own choice, or the control's."""
        if self.setup.manual is not None:
            return self.setup.manual
        return random_layers(self.setup.budget, self.setup.protected, self.config.recovery.seed)

    def _search(self, student: Trainer, teacher: Teacher | None) -> None:
        config = self.config
        selector = make_selector(config, self.setup.budget, self.setup.protected, self.progress.scores)
        if self.resume_from is not None:
            selector.load_state_dict(self.progress.selector)
        objective = self._objective(teacher)
        for iteration in range(self.progress.iteration, config.search_iters):
            start = time.perf_counter()
            result = search_step(
                student,
                self._batches(iteration),
                objective,
                iteration,
                selector,
                self.models.gate,
                train_weights=config.search.search_weights == "trained",
                own_masks=config.own_masks,
            )
            self.progress.selector = selector.state_dict()
            self.progress.scores = selector.scores.tolist()
            extra = {"temperature": selector.temperature(iteration), "scores": self.progress.scores}
            self._done(iteration, "search", result, time.perf_counter() - start, extra)
            if iteration + 1 == config.search_iters:
                self.progress.kept_layers = selector.kept_layers()
            self._save_if_due(student, force=iteration + 1 == config.search_iters)

    @property
    def _weights_are_the_source(self) -> bool:
        """Whether nothing but scores has been learned so far."""
        searching = self.progress.iteration <= self.config.search_iters
        return searching and self.config.search.search_weights == "frozen"

    def _saved_weights(self) -> Path | None:
        """The newest checkpoint, if there are weights in it."""
        return None if self._weights_are_the_source else checkpoint.latest(self.setup.run_dir.checkpoints)

    # Recovery

    def _begin_recovery(self, student: Trainer | None) -> Trainer:
        """The student with its pruned layers gone, or bypassed."""
        kept, saved = self.progress.kept_layers, self._saved_weights()
        if self.models.student_stays_whole:
            say(f"keeping layers {kept}")
            self.models.gate.bypass(set(range(self.setup.arch.num_layers)) - set(kept))
            return student or self.models.whole_student(None, saved)
        say(f"keeping layers {kept}, on pipeline stages of {self.setup.stages_of_layers(kept)}")
        student = self.models.pruned_student(kept, saved, self.progress.pruned)
        self.progress.pruned = True
        return student

    def _recover(self, student: Trainer, teacher: Teacher | None) -> None:
        if "pruned" not in self.progress.valid:
            self._validate("pruned", student.ddp)
        train_iters = self.config.recovery.train_iters
        if self.progress.iteration < train_iters and teacher is None:
            teacher = self.models.teacher(student)
        objective, patch = self._objective(teacher), self._stitch(student)
        for iteration in range(self.progress.iteration, train_iters):
            start = time.perf_counter()
            if patch is not None:
                patch.strength = strength_at(iteration, train_iters)
            result = train_step(student, self._batches(iteration), objective, iteration)
            self._done(iteration, "recovery", result, time.perf_counter() - start)
            self._save_if_due(student, force=iteration + 1 == train_iters)
        if patch is not None:
            patch.strength = 0.0  # not there yet where there are too few iterations to fade
        if train_iters > 0 and not self.config.lora.export_adapter:
            self.models.merge_and_round(student, self.progress.kept_layers)
        self._validate("recovered", student.ddp)

    def _stitch(self, student: Trainer) -> LinearPatch | None:
        """What bridges the cut while the model heals, in its place."""
        if self.progress.stitch is None:
            return None
        kept, num_layers = self.progress.kept_layers, self.setup.arch.num_layers
        patch, behind = LinearPatch(torch.tensor(self.progress.stitch)), cut_position(kept, num_layers)
        if behind < len(kept):
            patch.attach(student.model, kept[behind] if self.models.student_stays_whole else behind)
        return patch

    # Shared by both

    def _objective(self, teacher: Teacher | None) -> Objective:
        distillation = self.config.distillation
        return Objective(distillation.distill_loss, distillation.distill_tail, self.models.shard, teacher)

    def _batches(self, iteration: int) -> list:
        self.data.read_ahead(iteration + 1, self.setup.global_batch_size)
        return train_batches(
            self.data.train,
            iteration=iteration,
            global_batch_size=self.setup.global_batch_size,
            micro_batch_size=self.config.recovery.micro_batch_size,
            dp_rank=parallel.data_parallel_rank(),
            dp_size=parallel.data_parallel_size(),
            seed=self.config.recovery.seed,
        )

    def _validate(self, which: str, model: torch.nn.Module) -> None:
        if self.valid:
            with self.progress.timed("validation"):
                self.progress.valid[which] = {"loss": mean_loss(model, self.valid, self.models.shard)}

    def _done(self, iteration: int, stage: str, result: StepResult, seconds: float, extra: dict | None = None) -> None:
        self.progress.iteration = iteration + 1
        self.progress.spend(stage, seconds, self.setup.tokens_per_iteration)
        num_kept = len(self.progress.kept_layers) if result.mask is None else int((result.mask > 0).sum())
        record = {
            "iteration": iteration + 1,
            "stage": stage,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "num_kept": num_kept,
            "tokens": (iteration + 1) * self.setup.tokens_per_iteration,
            "seconds": seconds,
        }
        if result.mask is not None:
            record["mask"] = result.mask.tolist()
        self.metrics.log(record | (extra or {}))

    def _save_if_due(self, trainer: Trainer, force: bool) -> None:
        """Saves at the interval, at the ends of stages, and when asked to stop, which it then does."""
        interval = self.config.run.save_interval
        stopping = self.stop.agreed()
        if force or stopping or (interval and self.progress.iteration % interval == 0):
            folder, trained = self.setup.run_dir.checkpoints, None if self._weights_are_the_source else trainer
            checkpoint.save(folder, self.progress.iteration, trained, self.progress.state())
        if stopping:
            self.metrics.close()
            say(f"stopped by SIGTERM at iteration {self.progress.iteration}: the same command goes on from here")
            parallel.leave()
            raise SystemExit(0)

    # Export

    def _export(self, student: Trainer | None) -> None:
        """Report, plots and the HF folder, which gets its name last."""
        aside = aside_folder(self.setup.run_dir.hf)
        try:
            _emptied(aside)
            with self.progress.timed("export"):
                self._export_weights(student, aside)
            parallel.on_first_rank(lambda: self._finish_export(aside))
        except MegapruneError:
            if parallel.rank() == 0:  # what is half written would be in the way of the next attempt
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(aside_folder(self.setup.run_dir.adapter), ignore_errors=True)
            raise

    def _finish_export(self, aside: Path) -> None:
        setup, kept = self.setup, self.progress.kept_layers
        with one_line(aside, GO_ON):
            write_pruned_config(setup.source, kept, aside, self.config.model.mtp == "keep")
            report = self._report()
            write_report(setup.run_dir.report, report)
            records = read_metrics(setup.run_dir.path)
            for path in write_plots(records, setup.run_dir.plots, kept, report["valid"]):
                self.metrics.figure(path.stem, path)
            card = model_card(
                report,
                source_name=self.config.model.given,
                command=self.command,
                adapter=self.config.lora.export_adapter,
            )
            (aside / CARD_NAME).write_text(card)
            self.metrics.close()
            aside.rename(setup.run_dir.hf)
        print(result_table(report, setup.run_dir.path), flush=True)

    def _export_weights(self, student: Trainer | None, folder: Path) -> None:
        """The pruned model's weights; where an adapter was asked for, untrained ones and the adapter beside them."""
        setup, kept, whole = self.setup, self.progress.kept_layers, self.models.student_stays_whole
        size, keep_mtp = parse_size(self.config.run.max_shard_size), self.config.model.mtp == "keep"
        trained = student is not None and self.config.recovery.train_iters > 0
        if self.config.lora.export_adapter:
            adapter = setup.run_dir.adapter
            aside = _emptied(aside_folder(adapter))
            export_adapter(student.model, setup.source, kept, aside, setup.lora, str(setup.run_dir.hf), whole)
            parallel.on_first_rank(lambda: _replace(adapter, aside))
        elif trained:
            export_weights(student.model, setup.source, kept, folder, size, whole, keep_mtp)
        if self.config.lora.export_adapter or not trained:

            def write() -> None:
                with one_line(folder, GO_ON):
                    write_pruned_weights(setup.source, kept, folder, size, keep_mtp)

            parallel.on_first_rank(write)  # no weight has changed: the stored bits are the export

    def _report(self) -> Report:
        setup, kept = self.setup, self.progress.kept_layers
        return build_report(
            method=self.config.prune.method,
            num_source_layers=setup.arch.num_layers,
            kept_layers=kept,
            scores=self.progress.scores,
            before=inventory(setup.source.config),
            after=inventory(setup.source.config, kept),
            tokens_seen=self.progress.iteration * setup.tokens_per_iteration,
            seed=self.config.recovery.seed,
            stages=self.progress.stages,
            valid=self.progress.valid,
            seq_length=self.config.data.seq_length,
            candidates=self.progress.candidates,
        )


def _emptied(folder: Path) -> Path:
    """The folder, made anew by rank 0. Collective."""

    def make() -> None:
        with one_line(folder, GO_ON):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)

    parallel.on_first_rank(make)
    return folder


def _replace(folder: Path, by: Path) -> None:
    with one_line(folder, GO_ON):
        shutil.rmtree(folder, ignore_errors=True)
        by.rename(folder)
