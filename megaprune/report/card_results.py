"""Measurements on a model card: the hub's ``model-index``, and tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from megaprune.report.run_report import perplexity
from megaprune.utils.errors import MegapruneError

Tasks = Mapping[str, Mapping[str, Any]]

_TASK_TYPE, _TASK_NAME = "text-generation", "Text Generation"
_HARNESS = ("lm-evaluation-harness", "https://github.com/EleutherAI/lm-evaluation-harness")
# Task of lm-evaluation-harness -> its name on leaderboards, and its dataset on the hub with configuration and split.
_DATASETS: dict[str, tuple[str, str, str | None, str]] = {
    "arc_easy": ("ARC (Easy)", "allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("ARC (Challenge)", "allenai/ai2_arc", "ARC-Challenge", "test"),
    "boolq": ("BoolQ", "google/boolq", None, "validation"),
    "copa": ("COPA", "aps/super_glue", "copa", "validation"),
    "gsm8k": ("GSM8K", "openai/gsm8k", "main", "test"),
    "hellaswag": ("HellaSwag", "Rowan/hellaswag", None, "validation"),
    "ifeval": ("IFEval", "google/IFEval", None, "train"),
    "lambada_openai": ("LAMBADA (OpenAI)", "EleutherAI/lambada_openai", "default", "test"),
    "logiqa": ("LogiQA", "EleutherAI/logiqa", "logiqa", "test"),
    "mmlu": ("MMLU", "cais/mmlu", "all", "test"),
    "mmlu_pro": ("MMLU-Pro", "TIGER-Lab/MMLU-Pro", None, "test"),
    "openbookqa": ("OpenBookQA", "allenai/openbookqa", "main", "test"),
    "piqa": ("PIQA", "ybisk/piqa", None, "validation"),
    "truthfulqa_mc2": ("TruthfulQA", "truthfulqa/truthful_qa", "multiple_choice", "validation"),
    "winogrande": ("WinoGrande", "allenai/winogrande", "winogrande_xl", "validation"),
}
# lm-evaluation-harness's shares of right answers, which leaderboards show in percent.
_SHARES = {"acc": "accuracy", "acc_norm": "normalized accuracy", "exact_match": "exact match", "f1": "F1"}


def loss_results(loss: float, seq_length: int) -> list[EvalResult]:
    """Return the perplexity of a run's own held-out text, which has no name on the hub."""
    return [
        EvalResult(
            task_type=_TASK_TYPE,
            task_name=_TASK_NAME,
            dataset_type="text",
            dataset_name="held-out text of the run",
            dataset_args={"seq_length": seq_length},
            metric_type="perplexity",
            metric_name="perplexity per token",
            metric_value=round(perplexity(loss), 4),
        )
    ]


def task_results(tasks: Tasks) -> list[EvalResult]:
    """Return lm-evaluation-harness's scores, as `megaprune evaluate` writes them, as entries of a leaderboard."""
    results = []
    for task, metrics in tasks.items():
        name, dataset, config, split = _DATASETS.get(task, (task, task, None, None))
        for metric, value in _scores(metrics).items():
            results.append(
                EvalResult(
                    task_type=_TASK_TYPE,
                    task_name=_TASK_NAME,
                    dataset_type=dataset,
                    dataset_name=name,
                    dataset_config=config,
                    dataset_split=split,
                    dataset_args={"num_items": metrics["items"]} if "items" in metrics else None,
                    metric_type=metric,
                    metric_name=_SHARES.get(metric, metric),
                    metric_value=round(100 * value, 2) if metric in _SHARES else round(value, 4),
                    source_name=_HARNESS[0],
                    source_url=_HARNESS[1],
                )
            )
    return results


def model_index(name: str, results: Sequence[EvalResult]) -> list[dict[str, Any]]:
    """Return the value of ``model-index``, with entries of one dataset together."""
    return eval_results_to_model_index(name, list(results)) if results else []


def task_table(tasks: Tasks, source: Tasks | None) -> str:
    """Return the Markdown table of task scores in percent, beside those of the source model where they are given.

    Raises:
        MegapruneError: the source's file has none of the tasks.
    """
    if source is not None and not source.keys() & tasks.keys():
        raise MegapruneError(
            f"--source-evaluation has none of the tasks of --evaluation ({', '.join(tasks)}): evaluate the source on "
            "the same tasks"
        )
    head = ["task", "metric", "items", *(["source"] if source is not None else []), "this model"]
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for task, metrics in tasks.items():
        for metric, value in _scores(metrics).items():
            theirs = _scores((source or {}).get(task, {})).get(metric)
            row = [f"`{task}`", _SHARES.get(metric, metric), f"{metrics.get('items', '-')}"]
            if source is not None:
                row.append("-" if theirs is None else _shown(metric, theirs))
            lines.append([*row, _shown(metric, value)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(metric: str, value: float) -> str:
    return f"{100 * value:.2f}" if metric in _SHARES else f"{value:.4f}"


def _scores(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return {metric: value}; lm_eval lists "acc,none", "acc_stderr,none", the task's alias and numbers of items."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        metric = name.partition(",")[0]
        if isinstance(value, float) and math.isfinite(value) and "," in name and not metric.endswith("_stderr"):
            found.setdefault(metric, value)  # of several filters, such as gsm8k's, the strict first one
    return found
