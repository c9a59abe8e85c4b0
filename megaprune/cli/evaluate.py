"""The verb `evaluate`: how good is a model, and how far from its teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaprune.cli.parser import parse_flags
from megaprune.config.fields import flag, required
from megaprune.utils.errors import UsageError
from megaprune.utils.files import write_json


@dataclass
class EvaluateConfig:
    """The flags of `evaluate`."""

    hf_model: str = required("the model: a folder or a hub id")
    data: list[str] = flag("held-out text: .jsonl, .jsonl.zst, .parquet, folders of these, or hub dataset ids", [])
    teacher: str | None = flag("also measure KL and top-1 agreement against this model")
    tasks: str | None = flag("lm-evaluation-harness tasks, comma-separated (needs megaprune[eval])")
    output: str | None = flag("write the results to this JSON file")
    seq_length: int | None = flag("tokens of a window (default: what the model card says, else at most 2048)")
    micro_batch_size: int = flag("windows in one forward pass", 8)
    dtype: str = flag("auto, fp32, bf16 or fp16; auto is fp32 on the CPU, the model's own on a GPU", "auto")
    text_key: str = flag("the key that holds a row's text", "text")
    messages_key: str = flag("the key that holds a row's chat", "messages")
    limit: int | None = flag("only the first so many windows, and examples of each task")
    trust_remote_code: bool = flag("run code that the model's repository brings", False)


def run(argv: Sequence[str], command: str = "") -> None:
    """Evaluate what the command line asks for."""
    description = "Loss of an HF model, and agreement with a teacher."
    [config] = parse_flags(argv, [EvaluateConfig], "evaluate.py", description, recipes=False)
    evaluate(config)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluates, prints a table, writes `--output` where given, and returns what it wrote.

    Raises:
        MegapruneError or UsageError: as `evaluate_model` and `run_harness`, before anything is written.
    """
    # Imported here, so that --help doesn't wait for transformers.
    from megaprune.data.tokenizer import tokenizer_in
    from megaprune.evaluation.harness import find_tasks, run_harness
    from megaprune.evaluation.perplexity import evaluate_model, resolve_device, resolve_dtype

    tasks = [task.strip() for task in (config.tasks or "").split(",") if task.strip()]
    _check(config, tasks)
    device = resolve_device("auto")
    dtype = resolve_dtype(config.dtype, device)
    if tasks:
        find_tasks(tasks)  # a missing package or a wrong name shows now, not after the loss took its hour
        if Path(config.hf_model).is_dir():
            tokenizer_in(config.hf_model, config.trust_remote_code, "--hf-model")
    common = {
        "micro_batch_size": config.micro_batch_size,
        "device": device,
        "limit": config.limit,
        "trust_remote_code": config.trust_remote_code,
    }
    result: dict[str, Any] = {"hf_model": config.hf_model}
    if config.data:
        result = evaluate_model(
            config.hf_model,
            config.data,
            teacher=config.teacher,
            seq_length=config.seq_length,
            dtype=config.dtype,
            text_key=config.text_key,
            messages_key=config.messages_key,
            **common,
        )
    if tasks:
        result["tasks"] = run_harness(config.hf_model, tasks, dtype=dtype, **common)
    print(_table(result))
    if config.output:
        write_json(config.output, result)
        print(f"\nwritten to {config.output}")
    return result


def _check(config: EvaluateConfig, tasks: list[str]) -> None:
    if not config.data and not tasks:
        raise UsageError("nothing to evaluate on: give --data, --tasks or both")
    if config.teacher and not config.data:
        raise UsageError("--teacher needs --data, the text on which to compare the two models")
    if config.output and Path(config.output).is_dir():
        raise UsageError(f"--output {config.output} is a folder: give the name of a JSON file")


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
        rows += [(f"{task} {name}", f"{value:.4f}") for name, value in metrics.items() if _is_score(name, value)]
    width = max(len(name) for name, _ in rows) + 2 if rows else 0
    return "\n".join([result["hf_model"], *(f"  {name:<{width}}{value}" for name, value in rows)])


def _is_score(name: str, value: Any) -> bool:
    """lm_eval puts "acc,none" beside "acc_stderr,none" and the task's alias."""
    return isinstance(value, float) and "_stderr" not in name
