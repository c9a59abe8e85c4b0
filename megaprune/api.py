"""Python API: a run and its parts, as functions.

Keyword arguments are the flags of the commands, with underscores. The functions return reports and raise
`MegapruneError` (`UsageError` for a wrong argument). They print nothing: progress goes to the logger `megaprune`, at
the level INFO. They never exit the process. Under torchrun every rank calls them and gets the same report, and the
process group stays usable, so calls can follow each other.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaprune.config.checks import check_for_scoring, check_run
from megaprune.config.evaluation import EvaluateConfig
from megaprune.config.generation import GenerateConfig
from megaprune.config.mapping import fill, overridden
from megaprune.config.push import PushConfig
from megaprune.config.schema import ALTERNATIVES, GROUPS, WHAT_TO_PRUNE, Config
from megaprune.utils.errors import UsageError
from megaprune.utils.text import call_text

if TYPE_CHECKING:
    from megaprune.evaluation.result import Evaluation
    from megaprune.generation.run import Generated
    from megaprune.report.run_report import LayerScores, Report
    from megaprune.weights.push import Pushed
    from megaprune.weights.torch_dist.engine import Conversion

__all__ = ["evaluate", "export_hf", "generate_data", "import_hf", "prune", "push", "remove_layers", "score_layers"]


def prune(
    config: Config | None = None,
    *,
    should_stop: Callable[[], bool] | None = None,
    command: str | None = None,
    **flags: Any,
) -> "Report | None":
    """Prune and recover a model, or resume a stopped run.

    Args:
        config: the run; flags given as keywords override its values.
        should_stop: called on every rank after each iteration. If it returns True on any rank, the run saves a
            checkpoint and raises `RunStopped`; the same call resumes it. Give it on every rank or on none.
        command: the command that started the run, for the model card.
        flags: the flags of `megaprune prune`, such as `hf_model`, `train_data`, `num_layers_to_prune` and `save`.

    Returns:
        The report, equal to report.json in the run folder; None with `dry_run`.

    Raises:
        MegapruneError: the request can't be fulfilled; all progress is in a checkpoint.
        UsageError: a flag is wrong; nothing was written.
        RunStopped: `should_stop` returned True.
    """
    resolved = _config(config, flags)
    # Imported here and below, so that wrong flags are reported before megatron loads.
    from megaprune.pruning.resolve import open_run
    from megaprune.pruning.rounds import run
    from megaprune.utils.ranks import world_size

    options, source = open_run(resolved, world_size())
    return run(options, source, command or call_text("prune", resolved.changed() if config else flags), should_stop)


def score_layers(
    hf_model: str | Path | None = None,
    data: Sequence[str | Path] = (),
    method: str = "kl-init",
    **flags: Any,
) -> "LayerScores":
    """Score the layers of a model on calibration data. Trains nothing and writes nothing.

    Args:
        hf_model: the folder or Hub id of the model.
        data: the values of `--train-data`; `calibration_samples` windows of it are used.
        method: a method that uses calibration data and trains nothing.
        flags: other flags of `megaprune prune`, such as `seq_length`. With a budget, such as `num_layers_to_prune`, the
            method also selects the layers that stay.

    Returns:
        The scores [num_layers], higher = keep, and the kept layers if a budget is given.

    Raises:
        MegapruneError: the model or the data can't be used.
        UsageError: a flag is wrong, or the method does not score layers.
    """
    fixed = [name for name in ("save", "train_iters", "train_data") if name in flags]
    if fixed:
        raise UsageError(f"score_layers does not take {fixed[0]}: it neither trains nor writes, and reads only `data`")
    sized = any(flags.get(name) is not None for name in WHAT_TO_PRUNE)
    given: dict[str, Any] = {"hf_model": hf_model, "train_data": list(data), "method": method, "train_iters": 0}
    config = Config(*fill(GROUPS, given | ({} if sized else {"num_layers_to_prune": 1}) | flags))
    check_for_scoring(config)
    from megaprune.pruning.resolve import open_source, resolve
    from megaprune.pruning.score import score
    from megaprune.utils.ranks import world_size

    source = open_source(config)
    source.check_tensors()
    return score(resolve(config, source.config, world_size()), source, chooses=sized)


def remove_layers(
    hf_model: str | Path,
    layers: Sequence[int],
    save: str | Path,
    *,
    mtp: str = "keep",
    max_shard_size: str = "5GB",
) -> "Report":
    """Remove layers of an HF model. Every remaining tensor is copied bit for bit. Needs no process group.

    Args:
        layers: the layers to remove, counted from 0.
        save: the folder of the pruned model; it appears when it is complete.
        mtp: "keep" or "drop" multi-token-prediction layers.

    Raises:
        MegapruneError: the model can't be read, or the folder exists or can't be written.
        UsageError: an argument is wrong.
    """
    if mtp not in ("keep", "drop"):
        raise UsageError(f"--mtp {mtp!r}: give keep or drop")
    from megaprune.pruning.surgery import remove_layers_of
    from megaprune.weights.hub import resolve_hf_model
    from megaprune.weights.source import HFSource
    from megaprune.weights.writer import parse_size

    size, source = parse_size(max_shard_size), HFSource(resolve_hf_model(str(hf_model)))
    command = call_text("remove_layers", {"hf_model": str(hf_model), "layers": list(layers), "save": str(save)})
    return remove_layers_of(source, str(hf_model), layers, Path(save), mtp == "keep", size, command)


def evaluate(
    hf_model: str | Path,
    data: Sequence[str | Path] = (),
    *,
    teacher: str | Path | None = None,
    tasks: str | Sequence[str] | None = None,
    **flags: Any,
) -> "Evaluation":
    """Measure the loss of an HF model, its distance from a teacher, and benchmark tasks, with stock transformers.

    Args:
        data: held-out text.
        teacher: a model; the KL divergence from it and the top-1 agreement with it are measured too.
        tasks: tasks of lm-evaluation-harness, as a list or separated by commas.
        flags: other flags of `megaprune evaluate` except `output`, such as `seq_length`, `limit` and `dtype`.

    Returns:
        Losses in nats per token, and the scores of the tasks.

    Raises:
        MegapruneError: a model, the data or a task can't be used.
        UsageError: an argument is wrong.
    """
    words = tasks if tasks is None or isinstance(tasks, str) else ",".join(tasks)
    given = {"hf_model": hf_model, "data": list(data), "teacher": teacher, "tasks": words}
    [config] = fill([EvaluateConfig], given | flags)
    from megaprune.evaluation.run import evaluate_all

    return evaluate_all(**vars(config))


def generate_data(
    hf_model: str | Path, output: str | Path, prompts: Sequence[str | Path] = (), **flags: Any
) -> "Generated":
    """Let a model write text or chats for its own calibration and recovery. The same call continues interrupted work.

    Args:
        output: the file of JSON lines to write, for `--train-data`; it appears when it is complete.
        prompts: texts to continue or chats to answer.
        flags: other flags of `megaprune generate-data`, such as `max_new_tokens` and `temperature`.

    Returns:
        The number of rows and tokens, and the speed.

    Raises:
        MegapruneError: the model or the prompts can't be used, or the output can't be written.
        UsageError: an argument is wrong.
    """
    given = {"hf_model": str(hf_model), "output": str(output), "prompts": [str(path) for path in prompts]}
    [config] = fill([GenerateConfig], given | flags)
    from megaprune.generation.run import GenerateOptions
    from megaprune.generation.run import generate_data as generate

    return generate(GenerateOptions(**vars(config)))


def import_hf(
    hf_model: str | Path,
    megatron_path: str | Path,
    *,
    dtype: str | None = None,
    workers: int | None = None,
    resume: bool = False,
) -> "Conversion":
    """Convert HF safetensors to a Megatron-Core `torch_dist` checkpoint. Under torchrun the ranks share the work.

    Args:
        dtype: "bf16", "fp16" or "fp32" (default: as stored; bf16 for FP8).
        workers: threads per process.
        resume: continue unfinished work.

    Raises:
        MegapruneError: the model can't be read, or the checkpoint can't be written.
        UsageError: an argument is wrong.
    """
    names = {None: None, "bf16": "BF16", "fp16": "F16", "fp32": "F32"}
    if dtype not in names:
        raise UsageError(f"--dtype {dtype}: give one of bf16, fp16, fp32")
    from megaprune.utils.rank0 import together
    from megaprune.weights.hub import shared_hf_model
    from megaprune.weights.source import HFSource
    from megaprune.weights.torch_dist.engine import Conversion, WorkOptions, processes
    from megaprune.weights.torch_dist.import_hf import import_checkpoint

    options, folder = WorkOptions(_workers(workers), resume), Path(megatron_path).absolute()
    with processes():
        found = shared_hf_model(str(hf_model))
        source = together(lambda: HFSource(found))
        import_checkpoint(source, folder, names[dtype], options)
    return Conversion(len(source.names), source.folder, folder)


def export_hf(
    megatron_path: str | Path,
    hf_path: str | Path,
    *,
    max_shard_size: str = "5GB",
    workers: int | None = None,
    resume: bool = False,
) -> "Conversion":
    """Convert a Megatron-Core checkpoint made by `import_hf` to HF safetensors. Under torchrun the ranks share the
    work.

    Args:
        max_shard_size: the maximum size of a safetensors file, such as "500MB".
        workers: threads per process.
        resume: continue unfinished work.

    Raises:
        MegapruneError: the checkpoint can't be read, or the folder can't be written.
        UsageError: an argument is wrong.
    """
    from megaprune.weights.torch_dist.engine import Conversion, WorkOptions
    from megaprune.weights.torch_dist.export_hf import export_checkpoint
    from megaprune.weights.torch_dist.source import CheckpointSource
    from megaprune.weights.writer import parse_size

    size = parse_size(max_shard_size)
    source, folder = CheckpointSource(megatron_path), Path(hf_path).absolute()
    export_checkpoint(source, folder, size, WorkOptions(_workers(workers), resume))
    return Conversion(len(source.names), Path(megatron_path), folder)


def push(hf_model: str | Path, repo_id: str, **flags: Any) -> "Pushed":
    """Push a pruned model and its card to the Hugging Face Hub, in one commit. Weights of an earlier push that the
    model no longer has are deleted there.

    Args:
        hf_model: the `hf/` folder of a run.
        repo_id: the repository, as owner/name; it is made if it does not exist.
        flags: other flags of `megaprune push`, such as `private`, `license`, `base_model`, `evaluation` and `dry_run`.

    Returns:
        The files, the card, and what it lacks.

    Raises:
        MegapruneError: the folder holds no complete model with a card, or the hub refuses it.
        UsageError: an argument is wrong.
    """
    paths = {name: str(flags[name]) for name in ("evaluation", "source_evaluation") if flags.get(name) is not None}
    [config] = fill([PushConfig], {"hf_model": str(hf_model), "repo_id": repo_id} | flags | paths)
    if config.source_evaluation is not None and config.evaluation is None:
        raise UsageError("--source-evaluation needs --evaluation: the table shows both models")
    from megaprune.weights.push import Destination
    from megaprune.weights.push import push as send

    to = Destination(config.repo_id, config.private, config.revision, config.create_pr, config.commit_message)
    fields = {"license": config.license, "base_model": config.base_model}
    ours, theirs = (None if name is None else Path(name) for name in (config.evaluation, config.source_evaluation))
    return send(Path(config.hf_model), to, fields, ours, theirs, config.dry_run)


def _config(config: Config | None, flags: dict[str, Any]) -> Config:
    if config is None:
        return Config.from_mapping(flags)
    if flags:
        return Config.from_mapping(overridden(config.flat(), flags, ALTERNATIVES))
    check_run(config)
    return config


def _workers(number: int | None) -> int | None:
    if number is not None and number < 1:
        raise UsageError(f"--workers {number} is less than 1")
    return number
