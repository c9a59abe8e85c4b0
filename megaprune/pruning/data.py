"""The data of a run: prepared once by rank 0, read by every replica."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megaprune.data.batches import Batch, batches_for, eval_batches, even_size, train_batches, train_ids
from megaprune.data.blend import Blend, calibration_windows, find_blend, open_blend, training_windows
from megaprune.data.datasets import Windows, calibration_ids
from megaprune.data.indexed_files import IndexedFile
from megaprune.data.prepare import prepare_dataset
from megaprune.data.sources import find_sources
from megaprune.data.tokenizer import end_of_text, tokenizer_in
from megaprune.distillation.cache_key import cache_key
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.mcore import parallel
from megaprune.pruning.options import DataOptions, DistillationOptions, RunOptions, TrainingOptions
from megaprune.selection.registry import HELD_OUT_WINDOWS
from megaprune.utils.errors import UsageError
from megaprune.weights.tensor_source import TensorSource

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Datasets of a run, as this replica reads them. Text is calibrated on windows that are also used for training."""

    options: DataOptions
    training: TrainingOptions
    train: Windows | None
    valid: Windows | None
    calibration: Windows | None
    teacher_cache: TeacherCache | None = None

    def train_batches(self, iteration: int) -> list[Batch]:
        """Return this replica's micro-batches of an iteration, and start reading the cached targets of the next one."""
        self._read_ahead(iteration + 1)
        iteration += self.training.first_iteration
        return train_batches(self._trained_on, iteration=iteration, **self._order(), **self._dealt())

    def calibration_batches(self, count: int, skip: int = 0) -> list[Batch]:
        """Return this replica's share of `count` calibration windows after the first `skip` ones."""
        windows = self._calibrated_on
        ids = calibration_ids(len(windows), count, self.training.seed, skip)
        dealt = self._dealt()
        size = even_size(len(ids), dealt["micro_batch_size"], dealt["dp_size"])
        return list(batches_for(windows, ids, **dealt | dict(micro_batch_size=size)))

    @property
    def num_calibration_windows(self) -> int:
        return len(self._calibrated_on)

    def valid_batches(self, limit: int | None = None) -> list[Batch]:
        """Return this replica's share of the validation windows, or of the first `limit`. Each token counts once."""
        return list(eval_batches(self.valid, limit=limit, **self._dealt())) if self.valid else []

    @property
    def _trained_on(self) -> Windows:
        assert self.train is not None, "the configuration's checks ask for --train-data"
        return self.train

    @property
    def _calibrated_on(self) -> Windows:
        assert self.calibration is not None, "the configuration's checks ask for --train-data"
        return self.calibration

    def _read_ahead(self, iteration: int) -> None:
        """Start reading the cached targets of this replica's share of a later iteration."""
        if self.teacher_cache is not None and parallel.is_last_stage() and iteration < self.training.train_iters:
            iteration += self.training.first_iteration
            rows = train_ids(self._trained_on, iteration=iteration, **self._order(), **self._dealt())
            self.teacher_cache.prefetch([id for row in rows for id in row])

    def _order(self) -> dict[str, int]:
        return dict(global_batch_size=self.training.global_batch_size, seed=self.training.seed)

    def _dealt(self) -> dict[str, int]:
        return dict(
            micro_batch_size=self.options.micro_batch_size,
            dp_rank=parallel.data_parallel_rank(),
            dp_size=parallel.data_parallel_size(),
        )


def prepare_data(options: RunOptions, source: TensorSource, tokenizer: Any, cache_dir: Path) -> Data:
    """Tokenize the data on rank 0, or map what is cached. Collective.

    Raises:
        MegapruneError: the data can't be used; on every rank.
    """
    data, distillation = options.data, options.distillation
    # A teacher cache is indexed by windows in file order, which are then shuffled like windows of text.
    cached = distillation.teacher == "cached"
    blend = None if cached else parallel.on_rank0_for_all(lambda: find_blend(data.train, "--train-data"))
    if data.train and not data.reads_training:
        if not blend:  # no data is read, but a wrong path is still refused
            parallel.on_rank0(lambda: find_sources(data.train, "--train-data"))
        blend = None
    if cached:
        parallel.on_rank0(lambda: check_cacheable(data.train))

    vocab_size = options.model.arch.vocab_size

    def load() -> tuple[Windows | None, Windows | None, list[IndexedFile]]:
        train, valid, files = None, None, []
        if blend:
            end_of_text(tokenizer, vocab_size, "--train-data")
            files = open_blend(blend, "--train-data", data.seq_length, vocab_size)
        elif data.train and data.reads_training:
            train = stored_data(data, data.train, tokenizer, cache_dir, vocab_size)
        if data.valid:
            valid = stored_data(data, data.valid, tokenizer, cache_dir, vocab_size, "--valid-data", pad_last=True)
        return train, valid, files

    train, valid, files = first_on_rank0(load)
    calibration = train
    if blend:
        train, calibration = _blended(options, blend, files, tokenizer.eos_token_id, cache_dir)
    if calibration and data.calibrates:
        _check_calibration(options, calibration)
    teacher_cache = open_cache(distillation, source, tokenizer, train) if cached and train else None
    return Data(data, options.training, train, valid, calibration, teacher_cache)


def first_on_rank0(load: Callable[[], T]) -> T:
    """Return the datasets that rank 0 creates or finds. The other ranks map the same files. Collective.

    Raises:
        MegapruneError: the data can't be used, or a rank does not see the files; raised on every rank.
    """
    return parallel.together(lambda: parallel.on_rank0_for_all(load))


def stored_data(
    options: DataOptions,
    paths: Sequence[str],
    tokenizer: Any,
    cache_dir: Path,
    vocab_size: int | None,
    flag: str = "--train-data",
    pad_last: bool = False,
) -> Windows:
    """Return the windows of text, chats or preprocessed data in the order of the files (see `prepare_dataset`)."""
    return prepare_dataset(
        paths,
        tokenizer,
        seq_length=options.seq_length,
        text_key=options.text_key,
        messages_key=options.messages_key,
        cache_dir=cache_dir,
        flag=flag,
        pad_last=pad_last,
        vocab_size=vocab_size,
        workers=options.workers,
    )


def _check_calibration(options: RunOptions, calibration: Windows) -> None:
    calibration_ids(len(calibration), options.selection.calibration_samples, options.training.seed)
    if options.selection.method.needs_held_out and len(calibration) < 1 + HELD_OUT_WINDOWS:
        raise UsageError(
            f"--method {options.selection.name} validates on windows that it does not select by, and needs "
            f"{1 + HELD_OUT_WINDOWS}: --train-data has {len(calibration)}; give more data, or lower --seq-length"
        )


def _blended(
    options: RunOptions, blend: Blend, files: list[IndexedFile], pad_id: int, cache: Path
) -> tuple[Windows | None, Windows | None]:
    """Return the training samples of preprocessed data, and its calibration windows if they are used. Collective."""
    common: dict[str, Any] = dict(
        seq_length=options.data.seq_length,
        seed=options.training.seed,
        pad_id=pad_id,
        vocab_size=options.model.arch.vocab_size,
        cache_dir=cache,
    )
    train = calibration = None
    if options.data.calibrates:
        most = options.selection.calibration_samples * (1 + HELD_OUT_WINDOWS)
        calibration = calibration_windows(blend, files, most=most, **common)
    num_samples = options.training.data_iters * options.training.global_batch_size
    if num_samples:
        train = training_windows(blend, files, num_samples=num_samples, **common)
    return train, calibration


def run_tokenizer(options: RunOptions, source: TensorSource) -> Any:
    """Return the model's own tokenizer, or None if the run reads no text.

    Raises:
        MegapruneError: the folder contains no tokenizer that transformers can load.
    """
    return tokenizer_in(source.folder, options.model.trust_remote_code) if options.data.reads_windows else None


def check_cacheable(train_data: Sequence[str]) -> None:
    """Refuse training data whose windows depend on the seed and the length of the run.

    Raises:
        UsageError: the data are a weighted blend, whose samples Megatron draws.
    """
    blend = find_blend(train_data, "--train-data")
    if blend is not None and blend.weights is not None:
        raise UsageError(
            f"--train-data {' '.join(train_data)}: a cached teacher needs windows in the order of the files, but "
            "those of a blend depend on the seed; remove the weights, or use --teacher online"
        )


def open_cache(distillation: DistillationOptions, source: TensorSource, tokenizer: Any, train: Windows) -> TeacherCache:
    """Return the cached teacher of the training windows. Collective.

    Raises:
        MegapruneError: the cache belongs to other inputs, or is damaged; raised on every rank.
    """
    folder, wanted = distillation.logits, cache_key(source, tokenizer, train)
    assert folder is not None, "the configuration's checks ask for --teacher-logits"

    def load() -> TeacherCache:
        return TeacherCache(folder, wanted, distillation.top_k)

    def check() -> TeacherCache:
        cache = load()
        cache.check_shards()
        return cache

    checked: list[TeacherCache] = []
    parallel.on_rank0(lambda: checked.append(check()))
    return parallel.together(lambda: checked[0] if checked else load())
