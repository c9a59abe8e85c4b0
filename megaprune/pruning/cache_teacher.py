"""Teacher caching: one forward pass of the teacher over all training windows, reused by any number of runs."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from megaprune import device
from megaprune.data.batches import PADDING_ID, Batch, batches_for
from megaprune.data.datasets import Windows
from megaprune.data.tokenizer import tokenizer_in
from megaprune.distillation import cache_writer
from megaprune.distillation.cache_format import MANIFEST, CachePlan, read_manifest
from megaprune.distillation.cache_key import cache_key
from megaprune.distillation.losses import TeacherTargets, VocabShard, teacher_targets
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore import parallel, schedule
from megaprune.mcore.builder import build_model, in_half_precision
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.pruning.data import first_on_rank0, stored_data
from megaprune.pruning.options import CachingOptions
from megaprune.utils import stopping
from megaprune.utils.disk import check_room
from megaprune.utils.errors import MegapruneError, RunStopped
from megaprune.utils.locks import lock_beside, locked
from megaprune.utils.progress import bars_are_shown, say
from megaprune.utils.stopping import ShouldStop
from megaprune.weights.tensor_source import TensorSource

_FLAG = "--output"
# Micro-batches of a replica between two points at which the job may stop, for each pipeline stage.
_AT_ONCE = 4


def cache_teacher(options: CachingOptions, source: TensorSource, should_stop: ShouldStop | None = None) -> CachePlan:
    """Write the targets of all windows of the training data, or resume an unfinished cache. Collective.

    Args:
        should_stop: a `StopRequest`, which the job obeys between micro-batches.

    Returns:
        The contents of the cache, for printing.

    Raises:
        MegapruneError: the request can't be fulfilled; the same call resumes from the shards that are complete.
        RunStopped: the job was asked to stop; the same call resumes from the windows that are complete.
    """
    lock = locked(lock_beside(options.output), f"{_FLAG} {options.output}")
    with stopping.obeying(should_stop), parallel.session(options.sizes, options.timeout_minutes), lock:
        return _cache(options, source)


def _cache(options: CachingOptions, source: TensorSource) -> CachePlan:
    # If the job is refused before the first window is computed, the disk is left unchanged.
    with options.work.undone_if_refused() if parallel.rank() == 0 else nullcontext():
        plan, dataset = _plan(options, source)
        if parallel.on_rank0_for_all(options.output.exists):
            parallel.on_rank0(lambda: _check_finished(options.output, plan))
            say(f"{options.output} holds the finished cache already")
            return _left_alone(options, plan)
        parallel.on_rank0(lambda: cache_writer.check_plan(options.work.path, plan))
        parallel.on_rank0(lambda: check_room(options.output, plan.num_bytes - _bytes_in(options.work.path)))
        say(_size_of(plan))
        if options.dry_run:
            return _left_alone(options, plan)
        model = build_model(options.model.arch, options.pipeline.original, options.engine)
        import_weights(model, source)
        teacher = in_half_precision(model, options.engine).requires_grad_(False)
        parallel.on_rank0(lambda: _begin(options.work.path, plan))
    Caching(options, plan, dataset, teacher).run()
    parallel.on_rank0(lambda: _finish(options, plan))
    say(f"written to {options.output}: {plan.num_bytes / 1e6:,.1f} MB")
    return plan


def check_output(output: Path) -> None:
    """Check that the folder is free, or holds a cache. Raises MegapruneError otherwise."""
    if output.exists() and not (output / MANIFEST).is_file():
        raise MegapruneError(f"{_FLAG} {output} exists and holds no teacher cache: choose another folder")


def _left_alone(options: CachingOptions, plan: CachePlan) -> CachePlan:
    """End the job if there is nothing to compute. Collective."""
    parallel.barrier()
    if parallel.rank() == 0 and not cache_writer.is_begun(options.work.path):
        shutil.rmtree(options.work.path, ignore_errors=True)  # only data that were tokenized for this check
    return plan


def _plan(options: CachingOptions, source: TensorSource) -> tuple[CachePlan, Windows]:
    """Return the plan of the cache, and the data. Collective."""
    cache_dir = options.data.cache_dir or options.work.data_cache
    tokenizer = tokenizer_in(source.folder, options.model.trust_remote_code)

    def load() -> Windows:
        return stored_data(options.data, options.data.train, tokenizer, cache_dir, options.model.arch.vocab_size)

    dataset = first_on_rank0(load)
    key = cache_key(source, tokenizer, dataset)
    return CachePlan(key, options.distillation.top_k, "bf16" if options.engine.bf16 else "fp32"), dataset


def _check_finished(output: Path, plan: CachePlan) -> None:
    found, _ = read_manifest(output, _FLAG)
    found.key.check(plan.key, f"{_FLAG} {output} already exists and", "choose another folder")
    for name, flag in (("top_k", "--distill-top-k"), ("computed_in", "the teacher in")):
        had, wanted = getattr(found, name), getattr(plan, name)
        if had != wanted:
            raise MegapruneError(
                f"{_FLAG} {output} already exists and was made with {flag} {had}, not {wanted}: choose another folder"
            )


def _begin(folder: Path, plan: CachePlan) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache_writer.begin(folder, plan)
    except OSError as error:
        raise MegapruneError(f"{folder} can't be written ({error.strerror}): choose another {_FLAG}") from None


def _finish(options: CachingOptions, plan: CachePlan) -> None:
    try:
        shutil.rmtree(options.work.data_cache, ignore_errors=True)
        cache_writer.finish(options.work.path, options.output, plan)
    except OSError as error:
        raise MegapruneError(
            f"{error.filename or options.output} can't be written ({error.strerror}): fix this, and run the same "
            "command to continue"
        ) from None


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*.bin")) if folder.is_dir() else 0


def _size_of(plan: CachePlan) -> str:
    key = plan.key
    tokens = key.windows * key.seq_length
    return (
        f"{tokens:,} tokens in {key.windows:,} windows: {plan.num_bytes / 1e6:,.1f} MB in {plan.num_shards:,} shards, "
        f"{plan.num_bytes / tokens:.2f} bytes a token"
    )


class Caching:
    """The passes over the windows. Shards are distributed to the replicas in rounds, so that all replicas run equally
    many micro-batches: with expert parallelism, every micro-batch needs every rank.
    """

    def __init__(self, options: CachingOptions, plan: CachePlan, dataset: Windows, teacher: PipelineModel) -> None:
        self._plan, self._dataset, self._teacher = plan, dataset, teacher
        self._folder = options.work.path
        self._micro_batch_size = options.data.micro_batch_size
        self._pipeline_size = options.sizes.pipeline
        self._shard: VocabShard = vocab_shard(options.model.arch)
        self._begun: dict[int, int] = {}

    def run(self) -> None:
        """Write the missing shards. Collective."""
        left = self._left()
        if not left:
            return
        self._begun = parallel.on_rank0_for_all(
            lambda: {shard: cache_writer.begun_windows(self._folder, self._plan, shard) for shard in left}
        )
        windows = sum(len(self._windows_left(shard)) for shard in left)
        tokens, rate = windows * self._plan.key.seq_length, self._tokens_per_second()
        say(f"{tokens:,} tokens to compute: about {_duration(tokens / rate)} at {rate:,.0f} tokens/s")
        settings = dict(unit=" tokens", unit_scale=True, disable=not bars_are_shown(), dynamic_ncols=True)
        replicas = parallel.data_parallel_size()
        with tqdm(total=tokens, **settings) as bar:
            for start in range(0, len(left), replicas):
                self.write_round(left[start : start + replicas], bar)
                stopping.saved()
                parallel.stop_if_asked("teacher", "after a round of shards")

    def _windows_left(self, shard: int) -> range:
        """Return the windows of a shard that are to be computed."""
        return self._plan.windows_of(shard)[self._begun.get(shard, 0) :]

    def _left(self) -> list[int]:
        """Return the shards that are missing or damaged. Each rank checks its share."""
        count, size = self._plan.num_shards, parallel.world_size()
        mine = range(parallel.rank(), count, size)
        found = [shard for shard in mine if not cache_writer.is_written(self._folder, self._plan, shard)]
        left = sorted(shard for part in parallel.all_gather_objects(found) for shard in part)
        if len(left) < count:
            say(f"continuing: {count - len(left):,} of {count:,} shards exist")
        return left

    def write_round(self, shards: Sequence[int], bar: tqdm) -> None:
        """Compute one shard per replica. If there are fewer shards than replicas, the others compute windows whose
        targets are discarded.
        """
        size = self._micro_batch_size
        rows = max(-(-len(self._windows_left(shard)) // size) for shard in shards) * size
        place = parallel.data_parallel_rank()
        mine = list(self._windows_left(shards[place])) if place < len(shards) else []
        batches = self._batches([*mine, *[PADDING_ID] * (rows - len(mine))])
        tokens = sum(len(self._windows_left(shard)) for shard in shards) * self._plan.key.seq_length

        error = None
        writes = mine and parallel.is_last_stage() and parallel.tensor_parallel().rank == 0
        try:
            with self._file_of(shards[place]) if writes else nullcontext() as file:
                self._compute(batches, file, bar, tokens)
                if file is not None:
                    file.close()
        except MegapruneError as met:
            error = met
        parallel.raise_together(error)

    def _file_of(self, shard: int) -> cache_writer.ShardFile:
        return cache_writer.ShardFile(self._folder, self._plan, shard, self._begun.get(shard, 0))

    def _compute(self, batches: Sequence[Batch], file: cache_writer.ShardFile | None, bar: tqdm, tokens: int) -> None:
        """Compute the targets of a round in parts, each of which may be the last one of this job."""
        at_once = _AT_ONCE * self._pipeline_size
        for first in range(0, len(batches), at_once):
            some = batches[first : first + at_once]

            def advance(done: schedule.LossTokens, first: int = first) -> None:
                number = first + done.number
                bar.update(tokens * (number + 1) // len(batches) - tokens * number // len(batches))

            def keep(targets: TeacherTargets, number: int, some: Sequence[Batch] = some) -> None:
                windows = [window for window in some[number].sample_ids if window != PADDING_ID]
                if file is not None and windows:
                    file.add(windows, _on_cpu(targets, len(windows)))

            self._forward(some, keep, advance)
            if first + at_once < len(batches):
                self._stop_if_asked(file)

    def _stop_if_asked(self, file: cache_writer.ShardFile | None) -> None:
        try:
            parallel.stop_if_asked("teacher", "within a round of shards")
        except RunStopped as stop:
            parallel.together(lambda: file.suspend() if file is not None else None)
            stop.progressed = True
            raise

    def _batches(self, windows: Sequence[int]) -> list[Batch]:
        return list(batches_for(self._dataset, windows, micro_batch_size=self._micro_batch_size, dp_rank=0, dp_size=1))

    def _forward(
        self,
        batches: Sequence[Batch],
        keep: Callable[[TeacherTargets, int], None],
        before: Callable[[schedule.LossTokens], None] | None = None,
    ) -> None:
        def collect(logits: Tensor, tokens: schedule.LossTokens) -> None:
            # The top k of the whole vocabulary needs every tensor-parallel rank.
            keep(teacher_targets(logits, self._plan.top_k, self._shard), tokens.number)

        schedule.forward(self._teacher, batches, collect, before)

    def _tokens_per_second(self) -> float:
        """Measure the speed of all replicas together, on a few micro-batches whose targets are discarded."""
        count = min(len(self._dataset), self._micro_batch_size)
        window_ids = [*range(count), *[PADDING_ID] * (self._micro_batch_size - count)]
        batches, start = self._batches(window_ids) * (2 * self._pipeline_size), 0.0
        for _ in range(2):  # the first pass is slower
            parallel.barrier()
            start = time.perf_counter()
            self._forward(batches, lambda targets, number: None)
            device.synchronize()
            parallel.barrier()
        seconds = time.perf_counter() - start
        tokens = len(batches) * self._micro_batch_size * self._plan.key.seq_length * parallel.data_parallel_size()
        return tokens / seconds


def _on_cpu(targets: TeacherTargets, count: int) -> TeacherTargets:
    """Return the targets [s, b, ...] of the first windows of a micro-batch, on the CPU."""
    return targets.map(lambda column: column[:, :count].cpu())


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
