"""Benchmark tasks through lm-evaluation-harness."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megaprune.evaluation.task_files import quiet

# The metric of a task that enters a mean: the first of these that the task has, so normalized by length if possible.
_HEADLINES = ("acc_norm", "acc", "exact_match")
# Accuracies have standard errors in closed form; the harness's 100,000 take a minute for a perplexity.
_BOOTSTRAP_ITERS = 1000


@dataclass(frozen=True)
class TaskOptions:
    """The tasks to run, and how.

    Args:
        names: names of tasks, groups or tags, or paths of task YAML files.
        path: a folder of task files, of data files for the tasks that come with megaprune, or of both.
        limit: items of each task, from the first on; None for all.
        num_fewshot: solved items shown before each; None for the task's own number.
    """

    names: Sequence[str]
    path: str | None = None
    limit: int | None = None
    batch_size: int = 8
    num_fewshot: int | None = None


def run_harness(model: Any, tokenizer: Any, tasks: Sequence[Any], options: TaskOptions) -> dict[str, dict[str, Any]]:
    """Run tasks on a loaded model with lm_eval.simple_evaluate. Progress is shown on stderr.

    Args:
        tasks: from `load_tasks`.

    Returns:
        {task: {metric: value}} as the harness names them ("acc,none", "acc_stderr,none"), with `items`, the number
        of items that were run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with quiet():  # it says that a loaded model takes no loading options
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=options.batch_size)
    with quiet("lm_eval.evaluator"):  # it says that --num-fewshot replaces the task's own number
        found = lm_eval.simple_evaluate(
            model=wrapped,
            tasks=list(tasks),
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            bootstrap_iters=_BOOTSTRAP_ITERS,
            log_samples=False,
        )
    counts = found.get("n-samples", {})
    return {
        task: _measured(metrics) | ({"items": counts[task]["effective"]} if task in counts else {})
        for task, metrics in found["results"].items()
    }


def headline(metrics: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the main score of a task, and its standard error (NaN if unknown); None if it has no such score.

    It is the accuracy normalized by length where the task has it, else the accuracy, else exact match.
    """
    for wanted in _HEADLINES:
        for name, value in metrics.items():
            metric, _, filter_name = name.partition(",")
            if metric == wanted and isinstance(value, float):
                error = metrics.get(f"{metric}_stderr,{filter_name}")
                return value, error if isinstance(error, float) else math.nan
    return None


def mean_score(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float] | None:
    """Return the mean of the tasks' scores and its standard error; None if there is no score."""
    scores = [score for score in map(headline, tasks.values()) if score is not None]
    if not scores:
        return None
    error = math.sqrt(sum(error**2 for _, error in scores)) / len(scores)
    return {"score": sum(value for value, _ in scores) / len(scores), "stderr": error}


def _measured(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return a task's metrics without the harness's own notes beside them."""
    return {name: value for name, value in metrics.items() if "," in name or name == "alias"}
