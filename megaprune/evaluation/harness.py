"""Benchmark tasks through lm-evaluation-harness."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line


def run_harness(
    hf_model: str,
    tasks: Sequence[str],
    *,
    micro_batch_size: int = 8,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run `tasks` on `hf_model` with lm_eval.simple_evaluate and return {task: {metric: value}}.

    Args:
        tasks: names of tasks, groups or tags, or paths of task YAML files.
        dtype: a torch dtype, or "auto" for the model's own.
        limit: examples of each task; None for all. For trial runs only.

    Raises:
        MegapruneError: lm_eval isn't installed, or a task's data can't be fetched.
        UsageError: it doesn't know a task.
    """
    task_manager = find_tasks(tasks)
    import lm_eval

    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": hf_model, "dtype": dtype, "trust_remote_code": trust_remote_code},
            tasks=list(tasks),
            batch_size=micro_batch_size,
            device=str(device),
            limit=limit,
            log_samples=False,
            task_manager=task_manager,
        )
    except OSError as error:  # the datasets library's classes for what can't be fetched are OSErrors
        raise MegapruneError(
            f"--tasks {','.join(tasks)}: a task's data can't be read ({first_line(error)}); "
            "tasks are fetched from the Hugging Face hub when first used"
        ) from error
    return results["results"]


def find_tasks(tasks: Sequence[str]) -> Any:
    """Return lm_eval's TaskManager after checking that it knows all `tasks`. Raises as `run_harness`."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MegapruneError(
            "--tasks: lm-evaluation-harness isn't installed; run `pip install 'megaprune[eval]'`"
        ) from error
    task_manager = TaskManager()
    for task in tasks:
        if task not in task_manager.all_tasks and not Path(task).is_file():
            raise UsageError(f"--tasks {task}: lm_eval has no such task; `lm-eval ls tasks` lists them")
    return task_manager
