"""The verb `evaluate`: the quality of a model, and its distance from a teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune import api
from megaprune.cli.parser import parse_flags
from megaprune.config.evaluation import EvaluateConfig
from megaprune.config.fields import flag
from megaprune.utils.errors import UsageError
from megaprune.utils.files import write_json


@dataclass
class OutputConfig:
    """File for the results."""

    output: str | None = flag("write the results to this JSON file")


def run(argv: Sequence[str], command: str = "") -> None:
    """Evaluate the model that the command line describes, print a table, and write `--output` if given."""
    description = "Compute the loss of an HF model, and its agreement with a teacher."
    config, settings = parse_flags(argv, [EvaluateConfig, OutputConfig], "evaluate.py", description, recipes=False)
    if settings.output and Path(settings.output).is_dir():
        raise UsageError(f"--output {settings.output} is a folder: give the name of a JSON file")
    result = api.evaluate(**vars(config)).to_dict()
    print(_table(result))
    if settings.output:
        write_json(settings.output, result)
        print(f"\nwritten to {settings.output}")


def _table(result: dict[str, Any]) -> str:
    rows = []
    if "loss" in result:
        rows += [
            ("tokens", f"{result['tokens']:,} in windows of {result['seq_length']:,}"),
            ("loss", f"{result['loss']:.4f} nats"),
            ("perplexity", f"{result['perplexity']:,.3f}"),
        ]
    if "kl" in result:
        rows += [
            ("KL from teacher", f"{result['kl']:.4f} nats"),
            ("top-1 agreement", f"{result['top1_agreement']:.2%}"),
        ]
    for task, metrics in result.get("tasks", {}).items():
        rows += [(f"{task} {name}", _score(metrics, name)) for name, value in metrics.items() if _is_score(name, value)]
    if "tasks_mean" in result:
        mean = result["tasks_mean"]
        rows += [("mean of tasks", f"{mean['score']:.4f}" + _plus_minus(mean["stderr"]))]
    width = max(len(name) for name, _ in rows) + 2 if rows else 0
    return "\n".join([result["hf_model"], *(f"  {name:<{width}}{value}" for name, value in rows)])


def _is_score(name: str, value: Any) -> bool:
    """Return whether a value of lm_eval is a score. It lists "acc,none", "acc_stderr,none" and the task's alias."""
    return isinstance(value, float) and "_stderr" not in name


def _score(metrics: dict[str, Any], name: str) -> str:
    metric, _, filter_name = name.partition(",")
    return f"{metrics[name]:.4f}" + _plus_minus(metrics.get(f"{metric}_stderr,{filter_name}"))


def _plus_minus(error: Any) -> str:
    return f" ± {error:.4f}" if isinstance(error, float) else ""
