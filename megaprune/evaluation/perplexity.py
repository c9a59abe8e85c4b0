"""Loss of an HF model, and its distance from a teacher, with stock transformers.

Nothing here depends on pruning: the numbers are those that a user of the exported folder gets.
"""

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoModelForCausalLM

from megaprune.data.batches import Batch, eval_batches
from megaprune.data.prepare import prepare_dataset
from megaprune.data.tokenizer import tokenizer_in
from megaprune.report.model_card import read_seq_length
from megaprune.report.run_report import perplexity
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line
from megaprune.weights.hub import check_links, resolve_hf_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONGEST_DEFAULT_WINDOW = 2048


def evaluate_model(
    hf_model: str,
    data: Sequence[str],
    *,
    teacher: str | None = None,
    seq_length: int | None = None,
    micro_batch_size: int = 8,
    dtype: str = "auto",
    device: str | torch.device = "auto",
    text_key: str = "text",
    messages_key: str = "messages",
    limit: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Return the mean next-token cross-entropy of `hf_model` on `data`, and its divergence from `teacher`.

    The text is one token stream, cut into windows of `seq_length` that don't overlap: window i predicts tokens
    i * seq_length + 1 to (i + 1) * seq_length, each from the tokens before it in the window. The last window may be
    shorter, so every token but the first is predicted exactly once.

    Args:
        hf_model, teacher: folders or hub ids. The tokenizer is `hf_model`'s.
        data: as of `--train-data`.
        seq_length: tokens of a window; by default the length in the model card, else the model's context or 2048,
            whichever is less.
        dtype: "fp32", "bf16", "fp16", or "auto": fp32 on the CPU, on a GPU each model's own.
        device: "auto" is the GPU where there is one.
        limit: number of windows, from the first on; None for all.

    Returns:
        hf_model, data, seq_length, dtype, tokens (predicted), loss (nats per token), perplexity; with a
        teacher also teacher, kl (mean KL(teacher ‖ model) over the whole vocabulary, nats per token) and
        top1_agreement (share of positions where both rank the same token first).

    Raises:
        MegapruneError or UsageError: a model or data that can't be read, a teacher with another vocabulary
            size, a window beyond the model's context, or a loss that isn't finite.
    """
    check_positive(seq_length=seq_length, micro_batch_size=micro_batch_size, limit=limit)
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    config = _load("--hf-model", hf_model, AutoConfig, trust_remote_code).get_text_config()
    if teacher:
        _check_vocabulary(config, hf_model, teacher, trust_remote_code)
    seq_length = _window(config, hf_model, seq_length)
    tokenizer = tokenizer_in(hf_model, trust_remote_code, "--hf-model")
    with tempfile.TemporaryDirectory(prefix="megaprune-evaluate-") as cache:
        dataset = prepare_dataset(
            data,
            tokenizer,
            seq_length=seq_length,
            text_key=text_key,
            messages_key=messages_key,
            cache_dir=Path(cache),
            flag="--data",
            pad_last=True,
            vocab_size=config.vocab_size,
        )
        model = load_model("--hf-model", hf_model, torch_dtype, device, trust_remote_code)
        teacher_model = None
        if teacher:
            teacher_model = load_model("--teacher", teacher, torch_dtype, device, trust_remote_code)
        batches = eval_batches(dataset, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1, limit=limit)
        tokens, loss, kl, agreed = _totals(model, teacher_model, batches)
    used_dtype = str(model.dtype).removeprefix("torch.")
    result = {"hf_model": hf_model, "data": list(data), "seq_length": seq_length, "dtype": used_dtype}
    result |= {"tokens": tokens, "loss": loss / tokens, "perplexity": perplexity(loss / tokens)}
    if teacher:
        result |= {"teacher": teacher, "kl": kl / tokens, "top1_agreement": agreed / tokens}
    return result


def load_model(flag: str, path: str, dtype: torch.dtype | str, device: torch.device, trust_remote_code: bool) -> Any:
    """Load the causal language model at `path` in evaluation mode. A missing tensor is an error, where transformers
    would continue with random numbers.

    Raises:
        MegapruneError: the model can't be loaded; the message begins with `flag`.
    """
    options = {"dtype": dtype, "output_loading_info": True}
    model, info = _load(flag, path, AutoModelForCausalLM, trust_remote_code, **options)
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise MegapruneError(f"{flag} {path} has no weights for {missing[0]}{more}: export the model again")
    return model.to(device).eval()


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that `--device` names; "auto" is the one that megaprune runs on."""
    if device != "auto":
        return torch.device(device)
    from megaprune.device import torch_device

    return torch_device()


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """Return the dtype that `--dtype` names; "auto" is fp32 on the CPU and stays "auto", the model's own, elsewhere.

    Raises:
        UsageError: there is no such dtype.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: give one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


@torch.inference_mode()
def _totals(model: Any, teacher: Any | None, batches: Iterable[Batch]) -> tuple[int, float, float, float]:
    """Return sums over all predicted tokens: their number, cross-entropy, KL(teacher ‖ model), agreements."""
    tokens, sums = 0, [0.0, 0.0, 0.0]
    for batch in batches:
        inputs = batch.tokens.to(model.device)
        logits = model(input_ids=inputs, use_cache=False).logits
        teacher_logits = [None] * len(logits)
        if teacher:
            teacher_logits = teacher(input_ids=inputs, use_cache=False).logits
        labels, wanted = batch.labels.to(model.device), batch.loss_mask.to(model.device).bool()
        # Row by row: fp32 copies of a whole batch's logits would be the largest thing in memory.
        rows = zip(logits, teacher_logits, labels, wanted, strict=True)
        batch_sums = torch.stack([_row_sums(*row) for row in rows]).sum(0).tolist()
        if not all(map(math.isfinite, batch_sums)):
            flag, name = ("--hf-model", model.name_or_path)
            if teacher and math.isfinite(batch_sums[0]):
                flag, name = ("--teacher", teacher.name_or_path)
            raise MegapruneError(f"{flag} {name}: the loss isn't finite; its weights are damaged, or try --dtype fp32")
        sums = [total + part for total, part in zip(sums, batch_sums, strict=True)]
        tokens += int(wanted.sum())
    if not tokens:
        raise MegapruneError("--data holds no token that carries loss in these windows: raise --limit")
    loss, kl, agreed = sums
    return tokens, loss, kl, agreed


def _row_sums(
    logits: torch.Tensor, teacher_logits: torch.Tensor | None, labels: torch.Tensor, wanted: torch.Tensor
) -> torch.Tensor:
    """Return cross-entropy, KL and agreements of one window, summed over the wanted tokens, float64 [3].

    logits, teacher_logits: [s, v]; labels, wanted: [s].
    """
    log_probs = F.log_softmax(logits[wanted].float(), dim=-1)
    loss = F.nll_loss(log_probs, labels[wanted], reduction="none").double().sum()
    if teacher_logits is None:
        return torch.stack([loss, torch.zeros_like(loss), torch.zeros_like(loss)])
    teacher_log_probs = F.log_softmax(teacher_logits[wanted].float(), dim=-1)
    kl = F.kl_div(log_probs, teacher_log_probs, log_target=True, reduction="none").sum(-1).double().sum()
    agreed = (log_probs.argmax(-1) == teacher_log_probs.argmax(-1)).double().sum()
    return torch.stack([loss, kl, agreed])


def check_positive(**values: int | None) -> None:
    """Check that numbers that are given are at least 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise UsageError(f"--{name.replace('_', '-')} {value}: give a number of at least 1")


def _window(config: Any, hf_model: str, seq_length: int | None) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if seq_length is None:
        default = min(context or LONGEST_DEFAULT_WINDOW, LONGEST_DEFAULT_WINDOW)
        trained_with = read_seq_length(hf_model)
        return min(trained_with, context or trained_with) if trained_with else default
    if context and seq_length > context:
        raise UsageError(f"--seq-length {seq_length} is more than the {context} positions of {hf_model}: lower it")
    return seq_length


def _check_vocabulary(config: Any, hf_model: str, teacher: str, trust_remote_code: bool) -> None:
    size = _load("--teacher", teacher, AutoConfig, trust_remote_code).get_text_config().vocab_size
    if size != config.vocab_size:
        raise MegapruneError(
            f"--teacher {teacher} has a vocabulary of {size} and {hf_model} one of {config.vocab_size}: give "
            "the model that it was pruned from"
        )


def _load(flag: str, path: str, auto_class: Any, trust_remote_code: bool, **options: Any) -> Any:
    """Call `auto_class.from_pretrained`; its errors become one line."""
    path = _located(flag, path)
    try:
        return auto_class.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "trust_remote_code" in str(error):
            remedy = "it contains code; review it, then pass --trust-remote-code"
        else:
            remedy = f"it can't be loaded ({first_line(error)})"
        raise MegapruneError(f"{flag} {path}: {remedy}") from error


def _located(flag: str, path: str) -> str:
    """Return the path or hub id that transformers loads. What can't be a model is refused before the hub is asked."""
    folder = Path(path)
    if folder.is_dir():
        check_links(folder)
        if not (folder / "config.json").is_file():
            raise MegapruneError(f"{flag} {path}: it contains no config.json; a finished run's model is in RUN_DIR/hf")
        return path
    try:
        validate_repo_id(path)
    except HFValidationError:
        raise MegapruneError(f"{flag} {path}: no such folder, and not a model id; check the path") from None
    # transformers would take a file of that name for a config
    return str(resolve_hf_model(path, flag=flag)) if folder.exists() else path
