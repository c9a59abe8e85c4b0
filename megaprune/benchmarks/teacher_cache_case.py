"""The flags and the table of `benchmark teacher-cache`."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megaprune.config.fields import flag
from megaprune.utils.errors import UsageError

_LONGEST_DEFAULT_WINDOW = 256


@dataclass
class TeacherCacheConfig:
    """The flags of `benchmark teacher-cache`: a trained model, some text, and how often to pass over it."""

    hf_model: str | None = flag("HF model: a folder with safetensors, or a hub id")
    data: list[str] = field(default_factory=list, metadata={"help": "text, as --train-data of prune.py"})
    seq_length: int | None = flag("tokens in a window (default: 256, or the model's positions if fewer)")
    micro_batch_size: int = flag("windows in a forward pass", 4)
    windows: int = flag("windows of a round", 64)
    repeats: int = flag("rounds that are measured", 5)
    bf16: bool = flag("run the model in bf16 (default: fp32)", False)
    output: str | None = flag("write the results to this JSON file")


def check(config: TeacherCacheConfig) -> None:
    """Raises UsageError for flags out of range."""
    for name in ("seq_length", "micro_batch_size", "windows", "repeats"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)} is less than 1")
    if not (config.hf_model and config.data):
        raise UsageError("--hf-model and --data are required: a trained model, and text that it knows")
    if config.output and Path(config.output).is_dir():
        raise UsageError(f"--output {config.output} is a folder: give the name of a JSON file")


def measure(config: TeacherCacheConfig) -> dict[str, Any]:
    """The measurements, on this process alone.

    Raises:
        MegapruneError: the model or the data can't be used.
        UsageError: there are several processes.
    """
    from megaprune import device
    from megaprune.benchmarks.teacher_cache import measure_caching
    from megaprune.data.prepare import prepare_dataset
    from megaprune.data.tokenizer import tokenizer_in
    from megaprune.mcore import parallel
    from megaprune.mcore.builder import EngineOptions
    from megaprune.weights.hub import resolve_hf_model
    from megaprune.weights.source import HFSource

    if parallel.world_size() > 1:
        raise UsageError("teacher-cache is for one process: start it without torchrun")
    source, sizes = HFSource(resolve_hf_model(config.hf_model)), parallel.ParallelSizes()
    positions = source.family.architecture(source.config).max_position_embeddings
    seq_length = config.seq_length or min(_LONGEST_DEFAULT_WINDOW, positions)
    if seq_length > positions:
        raise UsageError(f"--seq-length {seq_length} is more than the model's {positions} positions")
    source.check_tensors()
    parallel.initialize(sizes)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_in(source.folder, False)
        dataset = prepare_dataset(
            config.data,
            tokenizer,
            seq_length=seq_length,
            cache_dir=Path(folder),
            flag="--data",
            vocab_size=source.family.architecture(source.config).vocab_size,
        )
        fused = device.use_transformer_engine("auto")
        engine = EngineOptions(sizes, fused, config.bf16, seq_length=seq_length)
        windows = min(config.windows, len(dataset))
        measured = measure_caching(source, dataset, engine, windows, config.micro_batch_size, config.repeats)
    parallel.finish()
    parallel.leave()
    return measured


def teacher_cache_table(result: Mapping[str, Any], aligned: Callable[[Sequence[Sequence[str]]], list[str]]) -> str:
    """The measured cases and encodings, for the terminal."""
    rows = [("", "tokens/s", "time by the forward pass")] + [
        (record["case"], f"{record['tokens_per_second']:,.0f}", f"{record['ratio']:.3f}") for record in result["cases"]
    ]
    errors = [("error of the loss, nats", "student", "a token at most", "of the mean")] + [
        (record["encoding"], record["student"], f"{record['largest']:.1e}", f"{record['of_the_mean']:.1e}")
        for record in result["encodings"]
    ]
    head = f"{result['tokens']:,} tokens, {result['bytes_per_token']:.2f} bytes each; medians of the rounds"
    return "\n".join([head, *aligned(rows), "", *aligned(errors)])
