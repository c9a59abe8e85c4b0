"""What caching a teacher costs beside its forward pass, how fast a cache is read, and what its 16 bits lose."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaprune import device
from megaprune.benchmarks.timing import interleaved, median_ratio
from megaprune.data.batches import PADDING_ID, batches_for, eval_batches
from megaprune.data.datasets import Windows
from megaprune.distillation import cache_writer
from megaprune.distillation.cache_format import CacheKey, CachePlan
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.losses import TeacherTargets, VocabShard, distillation_loss, teacher_targets
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore import schedule
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision
from megaprune.mcore.hf_weights import import_weights
from megaprune.weights.source import HFSource

FORWARD, TARGETS, CACHING, READING = "forward pass", "and top k", "and written", "read"
# A student as far off as recovery brings it, and one that has hardly learned.
_STUDENTS = {"near": 0.3, "far": 2.0}


def measure_caching(
    source: HFSource, dataset: Windows, engine: EngineOptions, windows: int, micro_batch_size: int, repeats: int
) -> dict[str, Any]:
    """Tokens a second of each case, medians over rounds, and the losses' errors by encoding.

    Args:
        windows: the first so many of the data are what every round sees.
    """
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], engine)
    import_weights(model, source)
    teacher = in_half_precision(model, engine).requires_grad_(False)
    batches = list(eval_batches(dataset, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1, limit=windows))
    key = CacheKey("model", "tokenizer", "data", dataset.seq_length, windows, arch.vocab_size)
    plan, shard = CachePlan(key, 10, "bf16" if engine.bf16 else "fp32"), vocab_shard(arch)

    def forward(collect: Callable[[Tensor, int], Any]) -> float:
        start = time.perf_counter()
        schedule.forward(teacher, batches, collect)
        device.synchronize()
        return time.perf_counter() - start

    def keep(some: range, add: Callable[[Sequence[int], TeacherTargets], None]) -> None:
        own = list(batches_for(dataset, some, micro_batch_size=micro_batch_size, dp_rank=0, dp_size=1))

        def collect(logits: Tensor, number: int) -> None:
            ids = [window for window in own[number].sample_ids if window != PADDING_ID]
            found = teacher_targets(logits, plan.top_k, shard)
            add(ids, TeacherTargets(*(column[:, : len(ids)].cpu() for column in found.__dict__.values())))

        schedule.forward(teacher, own, collect)

    with tempfile.TemporaryDirectory() as folder:
        cases = {
            FORWARD: lambda: forward(lambda logits, number: None),
            TARGETS: lambda: forward(lambda logits, number: teacher_targets(logits, plan.top_k, shard)),
            CACHING: lambda: _cache(Path(folder), plan, keep),
            READING: lambda: _read(Path(folder) / "cache", plan, micro_batch_size),
        }
        cases[CACHING]()  # what is read
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
    """Seconds of a pass whose targets are written, shard by shard."""
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
    """Seconds in which all windows are read in another order, as a run would."""
    order = torch.randperm(plan.key.windows, generator=torch.Generator().manual_seed(0)).split(micro_batch_size)
    start = time.perf_counter()
    cache = TeacherCache(folder, plan.key, plan.top_k)
    for windows in order:
        cache.windows(windows.tolist())
    return time.perf_counter() - start


def _encodings(teacher: torch.nn.Module, batches: list, plan: CachePlan, shard: VocabShard) -> list[dict[str, Any]]:
    """The error of the loss by encoding and student: of a token at most, and of the mean."""
    errors: dict[tuple[str, str], list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)

    def collect(logits: Tensor, number: int) -> None:
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
    """The targets [s, b, ...] as each way to spend 16 bits a logit gives them back."""
    logits, logsumexp = targets.logits, targets.logsumexp.unsqueeze(-1)
    below = (logits - logits[..., :1]).half().float()
    top = (logits[..., :1] - logsumexp).half().float()
    stored = [
        plan.layout.decode(_bytes(plan.layout.encode(_column(targets, place))), plan.top_k)
        for place in range(logits.shape[1])
    ]
    names = targets.__dict__
    return {
        "fp16 logits": replace(targets, logits=logits.half().float()),
        "fp16 log-probabilities": replace(targets, logits=(logits - logsumexp).half().float() + logsumexp),
        "fp16 log-probability of the first, others by the first": replace(targets, logits=logsumexp + top + below),
        "fp16 log-odds of the top k, others by the first (stored)": TeacherTargets(
            *(torch.stack([getattr(one, name) for one in stored], dim=1).to(logits.device) for name in names)
        ),
        "bf16 logits": replace(targets, logits=logits.bfloat16().float()),
    }


def _column(targets: TeacherTargets, place: int) -> TeacherTargets:
    return TeacherTargets(*(column[:, place] for column in targets.__dict__.values()))


def _bytes(block: bytes) -> Any:
    return torch.frombuffer(bytearray(block), dtype=torch.uint8).numpy()
