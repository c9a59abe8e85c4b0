"""An evaluation: loss and agreement on held-out text, and tasks of lm-evaluation-harness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaprune.data.tokenizer import tokenizer_in
from megaprune.evaluation.harness import TaskOptions, mean_score, run_harness
from megaprune.evaluation.perplexity import check_positive, evaluate_model, load_model, resolve_device, resolve_dtype
from megaprune.evaluation.result import Evaluation
from megaprune.evaluation.task_files import load_tasks
from megaprune.utils.errors import UsageError
from megaprune.utils.ranks import has_rendezvous, world_size
from megaprune.weights.hub import shared_hf_model
from megaprune.weights.torch_dist.engine import processes


def evaluate_all(
    hf_model: str,
    data: list[str],
    *,
    teacher: str | None,
    tasks: str | None,
    task_path: str | None,
    task_limit: int | None,
    task_batch_size: int,
    num_fewshot: int | None,
    dtype: str,
    limit: int | None,
    trust_remote_code: bool,
    **windows: Any,
) -> Evaluation:
    """Measure what the flags of `megaprune evaluate` ask for.

    Args:
        windows: other arguments of `evaluate_model`.

    Raises:
        MegapruneError or UsageError: as `evaluate_model` and `load_tasks`. What concerns the tasks is said before the
            loss is computed.
    """
    names = list(dict.fromkeys(task.strip() for task in (tasks or "").split(",") if task.strip()))
    if not data and not names:
        raise UsageError("nothing to evaluate on: give --data, --tasks or both")
    if teacher and not data:
        raise UsageError("--teacher needs --data, the text on which to compare the two models")
    if task_path and not names:
        raise UsageError("--task-path needs --tasks, the tasks to run")
    check_positive(limit=limit, task_limit=task_limit, task_batch_size=task_batch_size)
    named = {"hf_model": hf_model, **({"teacher": teacher} if teacher else {})}
    hf_model, teacher = _located(hf_model, "--hf-model"), teacher and _located(teacher, "--teacher")
    common: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    options = TaskOptions(names, task_path, task_limit or limit, task_batch_size, num_fewshot)
    loaded = load_tasks(names, task_path) if names else []
    if names and Path(hf_model).is_dir():
        tokenizer_in(hf_model, trust_remote_code, "--hf-model")
    result: dict[str, Any] = {"hf_model": hf_model}
    if data:
        result = evaluate_model(hf_model, data, teacher=teacher, limit=limit, **common, **windows)
    if loaded:
        result |= evaluate_tasks(hf_model, loaded, options, **common)
    return Evaluation(**result | {name: given for name, given in named.items() if name in result})


def _located(name: str, flag: str) -> str:
    """Return the model to load: a hub id is downloaded once on each node, if a launcher started several processes.
    Collective in that case.
    """
    if world_size() == 1 or not has_rendezvous():
        return name
    with processes():
        return str(shared_hf_model(name, flag))


def evaluate_tasks(
    hf_model: str, tasks: Sequence[Any], options: TaskOptions, *, dtype: str = "auto", trust_remote_code: bool = False
) -> dict[str, Any]:
    """Return the metrics of the tasks as `tasks`, the mean of their scores as `tasks_mean`, and the model's `dtype`.

    Args:
        tasks: from `load_tasks`.

    Raises:
        MegapruneError: the model can't be read.
    """
    model, tokenizer = open_model(hf_model, dtype, trust_remote_code)
    found = run_harness(model, tokenizer, tasks, options)
    return {"dtype": str(model.dtype).removeprefix("torch."), "tasks": found, "tasks_mean": mean_score(found)}


def open_model(hf_model: str, dtype: str = "auto", trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return a model on megaprune's device, and its tokenizer.

    Args:
        dtype: as `--dtype`.

    Raises:
        MegapruneError: either can't be read.
    """
    device = resolve_device("auto")
    tokenizer = tokenizer_in(hf_model, trust_remote_code, "--hf-model")
    return load_model("--hf-model", hf_model, resolve_dtype(dtype, device), device, trust_remote_code), tokenizer
