"""Caching a teacher: its forward pass over all training windows, once, for any number of runs to learn from."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megaprune import device
from megaprune.config.schema import Config
from megaprune.data.batches import PADDING_ID, Batch, Windows, batches_for, prepare_dataset
from megaprune.data.tokenizer import tokenizer_in
from megaprune.distillation import cache_writer
from megaprune.distillation.cache_format import MANIFEST, CachePlan, read_manifest
from megaprune.distillation.losses import TeacherTargets, VocabShard, teacher_targets
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore import parallel, schedule
from megaprune.mcore.builder import EngineOptions, build_model, check_parallel_sizes, in_half_precision
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages, stages_of
from megaprune.models import Architecture
from megaprune.models.sizes import layer_costs, output_cost
from megaprune.pruning.prepare import check_sequence, check_top_k, open_source, parallel_sizes
from megaprune.pruning.run_dir import RunDir
from megaprune.pruning.teacher_cache import cache_key, check_cacheable
from megaprune.utils.disk import check_room
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import aside_folder
from megaprune.utils.locks import lock_beside, locked
from megaprune.weights.source import HFSource

_FLAG = "--output"


@dataclass(frozen=True)
class _Setup:
    """A checked caching: the teacher and how it runs."""

    config: Config
    source: HFSource
    arch: Architecture
    engine: EngineOptions
    stages: list[int]
    output: Path

    @property
    def sizes(self) -> ParallelSizes:
        return self.engine.sizes

    @property
    def work(self) -> RunDir:
        """The folder of unfinished work."""
        return RunDir(aside_folder(self.output))


def cache_teacher(config: Config, output: Path) -> None:
    """Writes the targets of all windows of the training data, or goes on with it. Collective.

    Raises:
        MegapruneError: what was asked can't be done; what was written so far can be gone on with.
        UsageError: flags that don't fit the model or the processes.
    """
    setup = _prepare(config, output)
    parallel.initialize(setup.sizes)
    with locked(lock_beside(output), f"{_FLAG} {output}"):
        _cache(setup)
    parallel.finish()


def _cache(setup: _Setup) -> None:
    config = setup.config
    # What is refused before the first window is computed leaves the disk as it was.
    with setup.work.undone_if_refused() if parallel.rank() == 0 else nullcontext():
        plan, dataset = _plan(setup)
        if setup.output.exists():
            parallel.on_first_rank(lambda: _check_finished(setup.output, plan))
            _say(f"{setup.output} holds the finished cache already")
            _clear_data(setup)
            return
        parallel.on_first_rank(lambda: cache_writer.check_plan(setup.work.path, plan))
        parallel.on_first_rank(lambda: check_room(setup.output, plan.num_bytes - _bytes_in(setup.work.path)))
        _say(_size_of(plan))
        if config.run.dry_run:
            return _clear_data(setup)
        model = build_model(setup.arch, setup.stages, setup.engine)
        import_weights(model, setup.source)
        teacher = in_half_precision(model, setup.engine).requires_grad_(False)
        parallel.on_first_rank(lambda: _begin(setup.work.path, plan))
    _Caching(setup, plan, dataset, teacher).run()
    parallel.on_first_rank(lambda: _finish(setup, plan))
    _say(f"written to {setup.output}: {plan.num_bytes / 1e6:,.1f} MB")


def _clear_data(setup: _Setup) -> None:
    """Leaves nothing where nothing is to be done. Collective."""
    parallel.barrier()
    if parallel.rank() == 0 and not cache_writer.is_begun(setup.work.path):
        shutil.rmtree(setup.work.path, ignore_errors=True)  # nothing but the data that were tokenised to know this


def _prepare(config: Config, output: Path) -> _Setup:
    """Checks the flags against the model and the processes. Reads headers only; writes nothing."""
    if output.exists() and not (output / MANIFEST).is_file():
        raise MegapruneError(f"{_FLAG} {output} exists and holds no teacher cache: choose another folder")
    check_cacheable(config)
    source = open_source(config)
    source.check_tensors()
    arch = source.family.architecture(source.config)
    config = config.with_window(arch.max_position_embeddings)
    sizes = parallel_sizes(config, arch, parallel.world_size())
    check_parallel_sizes(arch, sizes, parallel.world_size())
    fused = device.use_transformer_engine(config.engine.transformer_impl)
    check_sequence(config, arch, sizes)
    check_top_k(config, arch)
    engine = EngineOptions(sizes, fused, config.recovery.bf16, seq_length=config.data.seq_length)
    layout = config.parallel.pipeline_model_parallel_layout
    if layout is not None:
        stages = stages_of(layout, sizes.pipeline, arch.num_layers)
    else:
        stages = balanced_stages(layer_costs(source.config), sizes.pipeline, output_cost(source.config))
    return _Setup(config, source, arch, engine, stages, output)


def _plan(setup: _Setup) -> tuple[CachePlan, Windows]:
    """The cache that is to be made, and the data. Collective."""
    config, cache_dir = setup.config, setup.config.data.data_cache_path or setup.work.data_cache
    tokenizer = tokenizer_in(setup.source.folder, config.model.trust_remote_code)

    def load() -> Windows:
        return prepare_dataset(
            config.data.train_data,
            tokenizer,
            seq_length=config.data.seq_length,
            text_key=config.data.text_key,
            messages_key=config.data.messages_key,
            cache_dir=Path(cache_dir),
            vocab_size=setup.arch.vocab_size if parallel.rank() == 0 else None,
        )

    dataset = parallel.on_first_rank(load) or load()
    key = cache_key(setup.source, tokenizer, dataset)
    return CachePlan(key, config.distillation.distill_top_k, "bf16" if setup.engine.bf16 else "fp32"), dataset


def _check_finished(output: Path, plan: CachePlan) -> None:
    found, _ = read_manifest(output, _FLAG)
    found.key.check(plan.key, f"{_FLAG} {output} is there and", "choose another folder")
    for name, flag in (("top_k", "--distill-top-k"), ("computed_in", "the teacher in")):
        had, wanted = getattr(found, name), getattr(plan, name)
        if had != wanted:
            raise MegapruneError(
                f"{_FLAG} {output} is there and was made with {flag} {had}, not {wanted}: choose another folder"
            )


def _begin(folder: Path, plan: CachePlan) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache_writer.begin(folder, plan)
    except OSError as error:
        raise MegapruneError(f"{folder} can't be written ({error.strerror}): choose another {_FLAG}") from None


def _finish(setup: _Setup, plan: CachePlan) -> None:
    try:
        shutil.rmtree(setup.work.data_cache, ignore_errors=True)
        cache_writer.finish(setup.work.path, setup.output, plan)
    except OSError as error:
        raise MegapruneError(
            f"{error.filename or setup.output} can't be written ({error.strerror}): mend that, and give the same "
            "command to go on"
        ) from None


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("shard-*.bin")) if folder.is_dir() else 0


def _say(text: str) -> None:
    if parallel.rank() == 0:
        print(text, flush=True)


def _size_of(plan: CachePlan) -> str:
    key = plan.key
    tokens = key.windows * key.seq_length
    return (
        f"{tokens:,} tokens in {key.windows:,} windows: {plan.num_bytes / 1e6:,.1f} MB in {plan.num_shards:,} shards, "
        f"{plan.num_bytes / tokens:.2f} bytes a token"
    )


class _Caching:
    """The passes over the windows. Shards are dealt out to the replicas, round by round, so that all replicas run
    equally many micro-batches: expert parallelism needs every rank in each."""

    def __init__(self, setup: _Setup, plan: CachePlan, dataset: Windows, teacher: torch.nn.Module) -> None:
        self._plan, self._dataset, self._teacher = plan, dataset, teacher
        self._folder = setup.work.path
        self._micro_batch_size = setup.config.recovery.micro_batch_size
        self._pipeline_size = setup.sizes.pipeline
        self._shard: VocabShard = vocab_shard(setup.arch)

    def run(self) -> None:
        """Writes the shards that are not there yet. Collective."""
        left = self._left()
        if not left:
            return
        windows = sum(len(self._plan.windows_of(shard)) for shard in left)
        tokens, rate = windows * self._plan.key.seq_length, self._tokens_per_second()
        _say(f"{tokens:,} tokens to compute: about {_duration(tokens / rate)} at {rate:,.0f} tokens/s")
        settings = dict(unit=" tokens", unit_scale=True, disable=parallel.rank() != 0, dynamic_ncols=True)
        replicas = parallel.data_parallel_size()
        with tqdm(total=tokens, **settings) as bar:
            for start in range(0, len(left), replicas):
                self._round(left[start : start + replicas], bar)

    def _left(self) -> list[int]:
        """The shards that are not there, or not as they were written. Each rank looks at its share."""
        count, size = self._plan.num_shards, parallel.world_size()
        mine = range(parallel.rank(), count, size)
        found = [shard for shard in mine if not cache_writer.is_written(self._folder, self._plan, shard)]
        left = sorted(shard for part in parallel.from_all_ranks(found) for shard in part)
        if len(left) < count:
            _say(f"going on: {count - len(left):,} of {count:,} shards are there")
        return left

    def _round(self, shards: Sequence[int], bar: tqdm) -> None:
        """One shard for each replica; where there are too few, a replica computes windows that nothing keeps."""
        size = self._micro_batch_size
        rows = max(-(-len(self._plan.windows_of(shard)) // size) for shard in shards) * size
        place = parallel.data_parallel_rank()
        mine = list(self._plan.windows_of(shards[place])) if place < len(shards) else []
        batches = self._batches([*mine, *[PADDING_ID] * (rows - len(mine))])
        tokens = sum(len(self._plan.windows_of(shard)) for shard in shards) * self._plan.key.seq_length

        def advance(number: int) -> None:
            bar.update(tokens * (number + 1) // len(batches) - tokens * number // len(batches))

        error = None
        writes = mine and parallel.is_last_stage() and parallel.tensor_parallel().rank == 0
        try:
            with cache_writer.ShardFile(self._folder, self._plan, shards[place]) if writes else nullcontext() as file:

                def keep(targets: TeacherTargets, number: int) -> None:
                    windows = [window for window in batches[number].sample_ids if window != PADDING_ID]
                    if writes and windows:
                        file.add(windows, _on_cpu(targets, len(windows)))

                self._forward(batches, keep, advance)
                if writes:
                    file.close()
        except MegapruneError as met:
            error = met
        parallel.raise_together(error)

    def _batches(self, windows: Sequence[int]) -> list[Batch]:
        return list(batches_for(self._dataset, windows, micro_batch_size=self._micro_batch_size, dp_rank=0, dp_size=1))

    def _forward(
        self,
        batches: Sequence[Batch],
        keep: Callable[[TeacherTargets, int], None],
        before: Callable[[int], None] | None = None,
    ) -> None:
        def collect(logits: Tensor, number: int) -> None:
            # Every tensor-parallel rank has a part in the top k of the whole vocabulary.
            keep(teacher_targets(logits, self._plan.top_k, self._shard), number)

        schedule.forward(self._teacher, batches, collect, before)

    def _tokens_per_second(self) -> float:
        """All replicas' speed, from a few micro-batches that nothing keeps."""
        count = min(len(self._dataset), self._micro_batch_size)
        window_ids = [*range(count), *[PADDING_ID] * (self._micro_batch_size - count)]
        batches, start = self._batches(window_ids) * (2 * self._pipeline_size), 0.0
        for _ in range(2):  # the first time is slower
            parallel.barrier()
            start = time.perf_counter()
            self._forward(batches, lambda targets, number: None)
            device.synchronize()
            parallel.barrier()
        seconds = time.perf_counter() - start
        tokens = len(batches) * self._micro_batch_size * self._plan.key.seq_length * parallel.data_parallel_size()
        return tokens / seconds


def _on_cpu(targets: TeacherTargets, count: int) -> TeacherTargets:
    """The targets [s, b, ...] of the first windows of a micro-batch."""
    return TeacherTargets(*(column[:, :count].cpu() for column in targets.__dict__.values()))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
