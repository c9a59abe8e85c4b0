"""The cost of caching a teacher beside its forward pass, the speed of reading, and the error of 16 bits a logit."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprune import device
from megaprune.benchmarks.options import TeacherCacheOptions
from megaprune.benchmarks.timing import Result, environment, interleaved, median_ratio
from megaprune.data.batches import PADDING_ID, batches_for, eval_batches
from megaprune.data.datasets import Windows
from megaprune.data.prepare import prepare_dataset
from megaprune.data.tokenizer import tokenizer_in
from megaprune.distillation import cache_writer
from megaprune.distillation.cache_format import CacheKey, CachePlan
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.losses import TeacherTargets, VocabShard, distillation_loss, teacher_targets
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore import parallel, schedule
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.utils.errors import UsageError
from megaprune.utils.text import aligned
from megaprune.weights.hub import resolve_hf_model
from megaprune.weights.source import HFSource
from megaprune.weights.tensor_source import TensorSource

FORWARD, TARGETS, CACHING, READING = "forward pass", "and top k", "and written", "read"
_LONGEST_DEFAULT_WINDOW = 256
# Noise on the teacher's logits: of a student that has recovered, and of one that has hardly learned.
_STUDENTS = {"near": 0.3, "far": 2.0}


def measure(options: TeacherCacheOptions) -> Result:
    """Time caching and reading, and measure the encodings' errors, on this process alone.

    Raises:
        MegapruneError: the model or the data can't be used.
        UsageError: there are several processes.
    """
    if parallel.world_size() > 1:
        raise UsageError("teacher-cache runs in one process: start it without torchrun")
    source, sizes = HFSource(resolve_hf_model(str(options.hf_model))), parallel.ParallelSizes()
    positions = source.family.architecture(source.config).max_position_embeddings
    seq_length = options.seq_length or min(_LONGEST_DEFAULT_WINDOW, positions)
    if seq_length > positions:
        raise UsageError(f"--seq-length {seq_length} is more than the model's {positions} positions")
    source.check_tensors()
    parallel.initialize(sizes)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer_in(source.folder, False)
        dataset = prepare_dataset(
            options.data,
            tokenizer,
            seq_length=seq_length,
            cache_dir=Path(folder),
            flag="--data",
            vocab_size=source.family.architecture(source.config).vocab_size,
        )
        fused = device.use_transformer_engine("auto")
        engine = EngineOptions(sizes, fused, options.bf16, seq_length=seq_length)
        windows = min(options.windows, len(dataset))
        measured = measure_caching(source, dataset, engine, windows, options.micro_batch_size, options.repeats)
    parallel.finish()
    parallel.leave()
    return {
        "benchmark": "teacher-cache",
        "settings": asdict(options),
        "environment": environment(device.model_name(), 1),
        **measured,
    }


def table(result: Result) -> str:
    """Return the measured cases and encodings as a table for the terminal."""
    rows = [("", "tokens/s", "time by the forward pass")] + [
        (record["case"], f"{record['tokens_per_second']:,.0f}", f"{record['ratio']:.3f}") for record in result["cases"]
    ]
    errors = [("error of the loss, nats", "student", "a token at most", "of the mean")] + [
        (record["encoding"], record["student"], f"{record['largest']:.1e}", f"{record['of_the_mean']:.1e}")
        for record in result["encodings"]
    ]
    head = f"{result['tokens']:,} tokens, {result['bytes_per_token']:.2f} bytes each; medians of the rounds"
    return "\n".join([head, *aligned(rows), "", *aligned(errors)])


def measure_caching(
    source: TensorSource, dataset: Windows, engine: EngineOptions, windows: int, micro_batch_size: int, repeats: int
) -> dict[str, Any]:
    """Measure the tokens per second of each case, medians over rounds, and the losses' errors by encoding.

    Args:
        windows: the number of windows, from the first on, that every round passes.
    """
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], engine)
    import_weights(model, source)
    teacher = in_half_precision(model, engine).requires_grad_(False)
    batches = list(eval_batches(dataset, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1, limit=windows))
    key = CacheKey("model", "tokenizer", "data", dataset.seq_length, windows, arch.vocab_size)
    plan, shard = CachePlan(key, 10, "bf16" if engine.bf16 else "fp32"), vocab_shard(arch)

    def forward(collect: Callable[[Tensor, schedule.LossTokens], Any]) -> float:
        start = time.perf_counter()
        schedule.forward(teacher, batches, collect)
        device.synchronize()
        return time.perf_counter() - start

    def keep(some: range, add: Callable[[Sequence[int], TeacherTargets], None]) -> None:
        own = list(batches_for(dataset, some, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1))

        def collect(logits: Tensor, tokens: schedule.LossTokens) -> None:
            ids = [window for window in own[tokens.number].sample_ids if window != PADDING_ID]
            add(ids, teacher_targets(logits, plan.top_k, shard).map(lambda column: column[:, : len(ids)].cpu()))

        schedule.forward(teacher, own, collect)

    with tempfile.TemporaryDirectory() as folder:
        cases = {
            FORWARD: lambda: forward(lambda logits, tokens: None),
            TARGETS: lambda: forward(lambda logits, tokens: teacher_targets(logits, plan.top_k, shard)),
            CACHING: lambda: _cache(Path(folder), plan, keep),
            READING: lambda: _read(Path(folder) / "cache", plan, micro_batch_size),
        }
        cases[CACHING]()  # the cache that is read
        samples = interleaved(cases, repeats, warmup=1)
    tokens = windows * dataset.seq_length
    return {
        "bytes_per_token": plan.num_bytes / tokens,
        "tokens": tokens,
        "cases": [
            {
                "case": case,
                "tokens_per_second": tokens / statistics.median(seconds),
                "ratio": median_ratio(seconds, samples[FORWARD]),
            }
            for case, seconds in samples.items()
        ],
        "encodings": _encodings(teacher, batches, plan, shard),
    }


def _cache(folder: Path, plan: CachePlan, keep: Callable[..., None]) -> float:
    """Return the seconds of a pass whose targets are written, shard by shard."""
    work, final = folder / "work", folder / "cache"
    shutil.rmtree(final, ignore_errors=True)
    work.mkdir()
    cache_writer.begin(work, plan)
    start = time.perf_counter()
    for number in range(plan.num_shards):
        with cache_writer.ShardFile(work, plan, number) as file:
            keep(plan.windows_of(number), file.add)
            file.close()
    seconds = time.perf_counter() - start
    cache_writer.finish(work, final, plan)
    return seconds


def _read(folder: Path, plan: CachePlan, micro_batch_size: int) -> float:
    """Return the seconds in which all windows are read in random order, as a run reads them."""
    order = torch.randperm(plan.key.windows, generator=torch.Generator().manual_seed(0)).split(micro_batch_size)
    start = time.perf_counter()
    cache = TeacherCache(folder, plan.key, plan.top_k)
    for windows in order:
        cache.windows(windows.tolist())
    return time.perf_counter() - start


def _encodings(teacher: PipelineModel, batches: list, plan: CachePlan, shard: VocabShard) -> list[dict[str, Any]]:
    """Return the error of the loss per encoding and student: the maximum over tokens, and of the mean."""
    errors: dict[tuple[str, str], list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def collect(logits: Tensor, tokens: schedule.LossTokens) -> None:
        targets = teacher_targets(logits, plan.top_k, shard)
        for student, spread in _STUDENTS.items():
            noise = torch.randn(logits.shape, generator=generator).to(logits.device)
            moved = logits.float() + spread * noise
            exact = distillation_loss(moved, targets, shard, "rest")
            for name, encoded in _encoded(targets, plan).items():
                error = distillation_loss(moved, encoded, shard, "rest") - exact
                errors.setdefault((name, student), []).append(error.double().cpu().flatten())

    schedule.forward(teacher, batches, collect)
    joined = {case: torch.cat(found) for case, found in errors.items()}
    return [
        {"encoding": name, "student": student, "largest": e.abs().max().item(), "of_the_mean": e.mean().abs().item()}
        for (name, student), e in joined.items()
    ]


def _encoded(targets: TeacherTargets, plan: CachePlan) -> Mapping[str, TeacherTargets]:
    """Return the targets [s, b, ...] after encoding and decoding, for each way to spend 16 bits a logit."""
    logits, logsumexp = targets.logits, targets.logsumexp.unsqueeze(-1)
    below = (logits - logits[..., :1]).half().float()
    top = (logits[..., :1] - logsumexp).half().float()
    stored = [
        plan.layout.decode(_bytes(plan.layout.encode(targets.window(place))), plan.top_k)
        for place in range(logits.shape[1])
    ]
    return {
        "fp16 logits": replace(targets, logits=logits.half().float()),
        "fp16 log-probabilities": replace(targets, logits=(logits - logsumexp).half().float() + logsumexp),
        "fp16 log-probability of the first, others by the first": replace(targets, logits=logsumexp + top + below),
        "fp16 log-odds of the top k, others by the first (stored)": TeacherTargets.stack(stored).map(
            lambda column: column.to(logits.device)
        ),
        "bf16 logits": replace(targets, logits=logits.bfloat16().float()),
    }


def _bytes(block: bytes) -> Any:
    return torch.frombuffer(bytearray(block), dtype=torch.uint8).numpy()
