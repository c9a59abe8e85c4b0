"""A pruning run, stage by stage: import, importance, search, prune, recover, export. Each goes on where it stopped."""

import shutil
import time
from contextlib import closing, nullcontext

import torch

from megaprune.config import SEARCHES, Config
from megaprune.distillation.teachers import OnlineTeacher, Teacher
from megaprune.mcore import checkpoint, parallel
from megaprune.mcore.builder import build_model, in_half_precision, vocab_shard
from megaprune.mcore.gated_layer import LayerGate
from megaprune.mcore.trainer import Trainer
from megaprune.mcore.weights_io import export_weights, import_weights, round_to_source_dtype
from megaprune.report.model_card import CARD_NAME, model_card
from megaprune.report.plots import write_plots
from megaprune.report.run_report import Report, build_report, result_table, write_report
from megaprune.selection.gumbel_topk import GumbelTopK
from megaprune.selection.initial_scores import scores_from_kl
from megaprune.selection.one_shot import random_layers, top_layers
from megaprune.training.data import train_batches
from megaprune.training.metrics import MetricsLogger, read_metrics
from megaprune.training.progress import Progress
from megaprune.training.scoring import layer_kl, mean_loss
from megaprune.training.setup import Data, Setup, load_tokenizer, prepare, prepare_data
from megaprune.training.signals import StopRequest
from megaprune.training.step import Objective, StepResult, search_step, train_step
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from megaprune.weights.writer import aside_folder, parse_size


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
        say(plan(setup))
    else:
        with setup.run_dir.undone_if_refused() if parallel.rank() == 0 else nullcontext():
            parallel.on_first_rank(lambda: setup.run_dir.begin(config))
            pruning_run = PruningRun(setup, prepare_data(setup, tokenizer), command)
            with closing(pruning_run.metrics):
                pruning_run.execute()
    parallel.finish()


def say(text: str) -> None:
    """Prints on rank 0."""
    if parallel.rank() == 0:
        print(text, flush=True)


def plan(setup: Setup) -> str:
    """What a run would do, in a few lines."""
    config, sizes = setup.config, setup.sizes
    iterations = config.recovery.train_iters
    searching = f"{config.search_iters} of them search"
    parameters = f"{setup.source.num_parameters():,} parameters"
    lines = [
        f"model      {config.model.hf_model}: {setup.arch.num_layers} layers, {parameters}",
        f"pruning    {config.prune.method}: {setup.arch.num_layers} -> {setup.num_kept} layers",
        f"processes  TP {sizes.tensor} x PP {sizes.pipeline} x DP {parallel.data_parallel_size()}",
        f"stages     {setup.stages()} layers, after pruning {setup.stages_of_layers(range(setup.num_kept))}",
        f"training   {iterations} iterations ({searching}) of {setup.tokens_per_iteration:,} tokens",
        f"writes     {setup.run_dir.path}",
    ]
    return "\n".join(lines)


class PruningRun:
    """The stages of one run and what they share."""

    def __init__(self, setup: Setup, data: Data, command: str) -> None:
        self.setup, self.data, self.command = setup, data, command
        self.config = setup.config
        self.shard = vocab_shard(setup.arch)
        self.valid = data.valid_batches()
        self.stop = StopRequest(self.config.run.exit_on_signal)
        self.resume_from = checkpoint.latest(setup.run_dir.checkpoints)
        self.progress = Progress()
        if self.resume_from is not None:
            self.progress = Progress(**checkpoint.load_state(self.resume_from))
            say(f"going on from {self.resume_from}, iteration {self.progress.iteration}")
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

    def execute(self) -> None:
        """Runs the stages that are left."""
        teacher = None
        if self.progress.kept_layers is None:
            teacher = self._select()
        student = None
        if self.config.recovery.train_iters > 0 or self.valid:
            student = self._build_student()
            self._recover(student, teacher)
        self._export(student)

    # Selection

    def _select(self) -> Teacher | None:
        """Chooses the layers that stay. Returns the teacher if it is already in memory."""
        gate = LayerGate()
        searching = self.config.prune.method in SEARCHES
        if not searching and not self._needs_original():
            self.progress.kept_layers = self._one_shot()
            return None
        original = build_model(self.setup.arch, self.setup.stages(), self.setup.engine, gate)
        if self.resume_from is None:
            self._measure_original(original, gate)
        if searching:
            trainer = Trainer(original, self.setup.engine, self.setup.optimizer)
            teacher = self._teacher(self._import_original())
            self._search(trainer, teacher, gate)
            return teacher
        self.progress.kept_layers = self._one_shot()
        return self._teacher(in_half_precision(original, self.setup.engine))

    def _needs_original(self) -> bool:
        """Whether a method without a search has a use for the original model."""
        trained = self.config.recovery.train_iters > 0 and self.config.distillation.distill_loss != "ce"
        return trained or bool(self.valid) or self.config.prune.method == "kl-init"

    def _import_original(self) -> torch.nn.Module | None:
        """A second copy of the original model, for the teacher; none where the loss has no teacher."""
        if self.config.distillation.distill_loss == "ce":
            return None
        model = build_model(self.setup.arch, self.setup.stages(), self.setup.engine)
        import_weights(model, self.setup.source)
        return in_half_precision(model, self.setup.engine)

    def _teacher(self, model: torch.nn.Module | None) -> Teacher | None:
        if model is None or self.config.distillation.distill_loss == "ce":
            return None
        return OnlineTeacher(model, self.shard, self.config.distillation.distill_top_k)

    def _measure_original(self, original: torch.nn.Module, gate: LayerGate) -> None:
        """Imports the model, and measures its validation loss and, where they are wanted, its layers' scores."""
        with self.progress.timed("import"):
            import_weights(original, self.setup.source)
        model = in_half_precision(original, self.setup.engine)
        self._validate("teacher", model)
        if self.config.prune.method in ("e3", "kl-init"):
            num_layers = self.setup.arch.num_layers
            batches = self.data.calibration_batches()
            windows = self.config.data.calibration_samples * (num_layers + 1)
            with self.progress.timed("importance", windows * self.config.data.seq_length):
                kl = layer_kl(model, gate, batches, num_layers, self.shard)
            self.progress.scores = scores_from_kl(kl, self.setup.protected).tolist()

    def _one_shot(self) -> list[int]:
        num_kept, protected = self.setup.num_kept, self.setup.protected
        if self.setup.manual is not None:
            return self.setup.manual
        if self.config.prune.method == "random":
            return random_layers(self.setup.arch.num_layers, num_kept, protected, self.config.recovery.seed)
        return top_layers(torch.tensor(self.progress.scores), num_kept, protected)

    def _search(self, trainer: Trainer, teacher: Teacher | None, gate: LayerGate) -> None:
        config = self.config
        selector = GumbelTopK(
            torch.tensor(self.progress.scores),
            self.setup.num_kept,
            self.setup.protected,
            config.search_iters,
            temperature=config.search.gumbel_temperature,
            anneal=config.search.gumbel_anneal,
            lr=config.search.mask_lr,
            seed=config.recovery.seed,
        )
        if self.resume_from is not None:
            checkpoint.load(self.resume_from, trainer)
            selector.load_state_dict(self.progress.selector)
        objective = self._objective(teacher)
        for iteration in range(self.progress.iteration, config.search_iters):
            start = time.perf_counter()
            result = search_step(trainer, self._batches(iteration), objective, iteration, selector, gate)
            self.progress.selector = selector.state_dict()
            self.progress.scores = selector.scores.tolist()
            extra = {"temperature": selector.temperature(iteration), "scores": self.progress.scores}
            self._done(iteration, "search", result, time.perf_counter() - start, extra)
            if iteration + 1 == config.search_iters:
                self.progress.kept_layers = selector.kept_layers()
            self._save_if_due(trainer, force=iteration + 1 == config.search_iters)

    # Recovery

    def _build_student(self) -> Trainer:
        """The pruned model in training: from the checkpoint where there is one, else from the source."""
        kept = self.progress.kept_layers
        model = build_model(self.setup.arch.pruned(kept), self.setup.stages_of_layers(kept), self.setup.engine)
        latest = checkpoint.latest(self.setup.run_dir.checkpoints)
        if latest is None:
            import_weights(model, self.setup.source, kept)
        trainer = Trainer(model, self.setup.engine, self.setup.optimizer)
        if latest is not None:
            checkpoint.load(latest, trainer, None if self.progress.pruned else kept)
        self.progress.pruned = True
        say(f"keeping layers {kept}, on pipeline stages of {self.setup.stages_of_layers(kept)}")
        return trainer

    def _recover(self, student: Trainer, teacher: Teacher | None) -> None:
        if "pruned" not in self.progress.valid:
            self._validate("pruned", student.ddp)
        train_iters = self.config.recovery.train_iters
        if self.progress.iteration < train_iters and teacher is None:
            teacher = self._teacher(self._import_original())
        objective = self._objective(teacher)
        for iteration in range(self.progress.iteration, train_iters):
            start = time.perf_counter()
            result = train_step(student, self._batches(iteration), objective, iteration)
            self._done(iteration, "recovery", result, time.perf_counter() - start)
            self._save_if_due(student, force=iteration + 1 == train_iters)
        if train_iters > 0:
            round_to_source_dtype(student.model, self.setup.source, self.progress.kept_layers)
        self._validate("recovered", student.ddp)

    # Shared by both

    def _objective(self, teacher: Teacher | None) -> Objective:
        distillation = self.config.distillation
        return Objective(distillation.distill_loss, distillation.distill_tail, self.shard, teacher)

    def _batches(self, iteration: int) -> list:
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
                self.progress.valid[which] = {"loss": mean_loss(model, self.valid, self.shard)}

    def _done(self, iteration: int, stage: str, result: StepResult, seconds: float, extra: dict | None = None) -> None:
        self.progress.iteration = iteration + 1
        self.progress.spend(stage, seconds, self.setup.tokens_per_iteration)
        kept = result.mask if result.mask is not None else torch.ones(self.setup.num_kept)
        record = {
            "iteration": iteration + 1,
            "stage": stage,
            "loss": result.loss,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "num_kept": int(kept.sum()),
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
            checkpoint.save(self.setup.run_dir.checkpoints, self.progress.iteration, trainer, self.progress.state())
        if stopping:
            self.metrics.close()
            say(f"stopped by SIGTERM at iteration {self.progress.iteration}: the same command goes on from here")
            parallel.leave()
            raise SystemExit(0)

    # Export

    def _export(self, student: Trainer | None) -> None:
        """Report, plots and the HF folder, which gets its name last."""
        setup, kept = self.setup, self.progress.kept_layers
        final, first = setup.run_dir.hf, parallel.rank() == 0
        aside, size = aside_folder(final), parse_size(self.config.run.max_shard_size)
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        parallel.barrier()
        with self.progress.timed("export"):
            if student is not None and self.config.recovery.train_iters > 0:
                export_weights(student.model, setup.source, kept, aside, size)
            elif first:  # no weight has changed: the stored bits are the export
                write_pruned_weights(setup.source, kept, aside, size)
        if first:
            write_pruned_config(setup.source, kept, aside)
            report = self._report()
            write_report(setup.run_dir.report, report)
            records = read_metrics(setup.run_dir.path)
            for path in write_plots(records, setup.run_dir.plots, kept, report["valid"]):
                self.metrics.figure(path.stem, path)
            card = model_card(report, source_name=self.config.model.hf_model, command=self.command)
            (aside / CARD_NAME).write_text(card)
            aside.rename(final)
            self.metrics.close()
            print(result_table(report, setup.run_dir.path), flush=True)
        parallel.barrier()

    def _report(self) -> Report:
        setup, kept = self.setup, self.progress.kept_layers
        return build_report(
            method=self.config.prune.method,
            num_source_layers=setup.arch.num_layers,
            kept_layers=kept,
            scores=self.progress.scores,
            params_before=setup.source.num_parameters(),
            params_after=setup.source.num_parameters(kept),
            tokens_seen=self.progress.iteration * setup.tokens_per_iteration,
            seed=self.config.recovery.seed,
            stages=self.progress.stages,
            valid=self.progress.valid,
            seq_length=self.config.data.seq_length,
        )
