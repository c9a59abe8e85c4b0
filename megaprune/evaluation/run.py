"""An evaluation: loss and agreement on held-out text, and tasks of lm-evaluation-harness."""

from dataclasses import dataclass
from typing import Any

from megaprune.config.fields import flag, required
from megaprune.evaluation.result import Evaluation
from megaprune.utils.errors import UsageError


@dataclass
class EvaluateConfig:
    """The model, what it is evaluated on, and how: the flags of `evaluate`."""

    hf_model: str = required("the model: a folder or a hub id")
    data: list[str] = flag("held-out text: .jsonl, .jsonl.zst, .parquet, folders of these, or hub dataset ids", [])
    teacher: str | None = flag("also measure KL and top-1 agreement against this model")
    tasks: str | None = flag("lm-evaluation-harness tasks, comma-separated (needs megaprune[eval])")
    seq_length: int | None = flag("tokens of a window (default: what the model card says, else at most 2048)")
    micro_batch_size: int = flag("windows in one forward pass", 8)
    dtype: str = flag("auto, fp32, bf16 or fp16; auto is fp32 on the CPU, the model's own on a GPU", "auto")
    text_key: str = flag("the key that holds a row's text", "text")
    messages_key: str = flag("the key that holds a row's chat", "messages")
    limit: int | None = flag("only the first so many windows, and examples of each task")
    trust_remote_code: bool = flag("run code that the model's repository brings", False)


def evaluate_all(config: EvaluateConfig) -> Evaluation:
    """Measure what the flags ask for.

    Raises:
        MegapruneError or UsageError: as `evaluate_model` and `run_harness`, before anything is measured.
    """
    # Imported here, so that --help doesn't wait for transformers.
    from megaprune.evaluation.harness import find_tasks, run_harness
    from megaprune.evaluation.perplexity import evaluate_model, resolve_device, resolve_dtype

    tasks = [task.strip() for task in (config.tasks or "").split(",") if task.strip()]
    _check(config, tasks)
    device = resolve_device("auto")
    dtype = resolve_dtype(config.dtype, device)
    if tasks:
        find_tasks(tasks)  # a missing package or a wrong name shows now, not after the loss took its hour
    common: dict[str, Any] = {
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
    return Evaluation(**result)


def _check(config: EvaluateConfig, tasks: list[str]) -> None:
    if not config.data and not tasks:
        raise UsageError("nothing to evaluate on: give --data, --tasks or both")
    if config.teacher and not config.data:
        raise UsageError("--teacher needs --data, the text on which to compare the two models")
