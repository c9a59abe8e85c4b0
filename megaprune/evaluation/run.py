"""An evaluation: loss and agreement on held-out text, and tasks of lm-evaluation-harness."""

from pathlib import Path
from typing import Any

from megaprune.data.tokenizer import tokenizer_in
from megaprune.evaluation.harness import find_tasks, run_harness
from megaprune.evaluation.perplexity import evaluate_model, resolve_device, resolve_dtype
from megaprune.evaluation.result import Evaluation
from megaprune.utils.errors import UsageError


def evaluate_all(
    hf_model: str,
    data: list[str],
    *,
    teacher: str | None,
    tasks: str | None,
    seq_length: int | None,
    micro_batch_size: int,
    dtype: str,
    text_key: str,
    messages_key: str,
    limit: int | None,
    trust_remote_code: bool,
) -> Evaluation:
    """Measure what the flags of `megaprune evaluate` ask for.

    Raises:
        MegapruneError or UsageError: as `evaluate_model` and `run_harness`, before anything is measured.
    """
    names = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    if not data and not names:
        raise UsageError("nothing to evaluate on: give --data, --tasks or both")
    if teacher and not data:
        raise UsageError("--teacher needs --data, the text on which to compare the two models")
    device = resolve_device("auto")
    torch_dtype = resolve_dtype(dtype, device)
    if names:
        find_tasks(names)  # a missing package or a wrong name shows now, not after the loss took its hour
        if Path(hf_model).is_dir():
            tokenizer_in(hf_model, trust_remote_code, "--hf-model")
    common: dict[str, Any] = {
        "micro_batch_size": micro_batch_size,
        "device": device,
        "limit": limit,
        "trust_remote_code": trust_remote_code,
    }
    result: dict[str, Any] = {"hf_model": hf_model}
    if data:
        result = evaluate_model(
            hf_model,
            data,
            teacher=teacher,
            seq_length=seq_length,
            dtype=dtype,
            text_key=text_key,
            messages_key=messages_key,
            **common,
        )
    if names:
        result["tasks"] = run_harness(hf_model, names, dtype=torch_dtype, **common)
    return Evaluation(**result)
