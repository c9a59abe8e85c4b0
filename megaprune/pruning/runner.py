"""A pruning run, stage by stage: import, select, prune, recover, export. Each stage resumes from its checkpoint."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from megaprune import device
from megaprune.mcore import parallel
from megaprune.models.sizes import model_size
from megaprune.pruning.candidates import choose_healed
from megaprune.pruning.context import RunContext
from megaprune.pruning.data import prepare_data, run_tokenizer
from megaprune.pruning.export import GO_ON, export
from megaprune.pruning.models import Origin
from megaprune.pruning.options import RunOptions
from megaprune.pruning.select import select
from megaprune.pruning.train import begin_recovery, recover
from megaprune.report.run_report import Report, read_report
from megaprune.utils import stopping
from megaprune.utils.disk import one_line
from megaprune.utils.locks import locked
from megaprune.utils.progress import say
from megaprune.utils.stopping import ShouldStop
from megaprune.weights.tensor_source import TensorSource


def run(
    options: RunOptions,
    source: TensorSource,
    command: str,
    should_stop: ShouldStop | None = None,
    origin: Origin | None = None,
) -> Report | None:
    """Start or resume a run. Collective; the process group stays usable.

    Args:
        command: the command line or call that started the run, for the model card.
        should_stop: see `RunContext`.
        origin: the teacher's model, if it is not `source`.

    Returns:
        The report; None for a dry run.

    Raises:
        MegapruneError: the request can't be fulfilled. Either nothing was written, or all progress is in a checkpoint.
        RunStopped: the run was asked to stop; its progress was saved.
    """
    with stopping.obeying(should_stop):
        return _run(options, source, command, should_stop, origin)


def _run(
    options: RunOptions, source: TensorSource, command: str, should_stop: ShouldStop | None, origin: Origin | None
) -> Report | None:
    run_dir, dry_run = options.output.run_dir, options.output.dry_run
    if parallel.on_rank0_for_all(run_dir.hf.exists):
        say(f"{run_dir.path} holds the finished run already: {run_dir.hf}")
        return parallel.on_rank0_for_all(lambda: read_report(run_dir.report))
    with parallel.session(options.sizes, options.timeout_minutes):
        tokenizer = run_tokenizer(options, source)
        if dry_run:
            say(describe(options))
            return None
        undoing = run_dir.undone_if_refused() if parallel.rank() == 0 else nullcontext()
        with locked(run_dir.lock, f"--save {run_dir.path}"), undoing, one_line(run_dir.path, GO_ON):
            parallel.on_rank0(lambda: run_dir.begin(options.output.settings))
            data = prepare_data(options, origin.source if origin else source, tokenizer, cache_dir(options))
            context = RunContext(options, source, data, should_stop, origin)
            with _closing(context):
                _execute(context, command)
        return parallel.on_rank0_for_all(lambda: read_report(run_dir.report))


@contextmanager
def _closing(context: RunContext) -> Iterator[None]:
    """Close the files of a run after the block."""
    try:
        yield
    except BaseException:
        context.abandon()
        raise
    context.close()


def cache_dir(options: RunOptions) -> Path:
    """Return the folder of a run's tokenized data."""
    return options.data.cache_dir or options.output.run_dir.data_cache


def _execute(context: RunContext, command: str) -> None:
    """Run the remaining stages."""
    student = teacher = None
    if context.progress.kept_layers is None:
        student, teacher = select(context)
    teacher = choose_healed(context, teacher)
    if context.options.training.changes_weights or context.valid:
        student = begin_recovery(context, student)
        recover(context, student, teacher)
        student.close()
    teacher = None
    device.free_unused()
    export(context, student, command)
    stopping.saved()


def describe(options: RunOptions) -> str:
    """Return a summary of the run in a few lines."""
    model, sizes, pipeline, selection = options.model, options.sizes, options.pipeline, options.selection
    num_layers, training = model.arch.num_layers, options.training
    total = model_size(model.hf_config).total
    shortest = selection.fewest_layers()
    goal = f"{len(shortest)} layers"
    if not selection.budget.counts_layers:
        outside = total - sum(selection.budget.costs)
        goal = f"at most {selection.budget.limit + outside:,} parameters, at least {goal}"
    if training.rounds > 1:
        goal += f", in {training.rounds} rounds"
    searching = f"{training.search_iters} of them search"
    lines = [
        f"model      {model.name}: {num_layers} layers, {total:,} parameters",
        f"pruning    {selection.name}: {num_layers} layers -> {goal}",
        f"processes  TP {sizes.tensor} x PP {sizes.pipeline} x DP {parallel.data_parallel_size()}",
        f"stages     {list(pipeline.original)} layers, after pruning {pipeline.stages_of_layers(shortest)}",
        f"training   {training.train_iters} iterations ({searching}) of {options.tokens_per_iteration:,} tokens",
        f"writes     {options.output.run_dir.path}",
    ]
    return "\n".join(lines)
