"""Blends: windows of preprocessed .bin/.idx datasets, mixed by weights for training, in file order for validation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megaprune.data.datasets import CALIBRATION_STREAM, JoinedWindows, PackedDataset
from megaprune.data.indexed_files import IndexedFile, check_tokens, check_vocabulary, open_indexed
from megaprune.data.sources import FileSource, source_identity
from megaprune.data.token_cache import TokenStream
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.files import aside_of, put_in_place_once


@dataclass(frozen=True)
class Blend:
    """Preprocessed datasets and their weights; without weights, each dataset counts by its size."""

    prefixes: list[str]
    weights: list[float] | None


def find_blend(words: Sequence[str], flag: str) -> Blend | None:
    """Return the blend that the words of a flag describe: PREFIX..., or WEIGHT PREFIX WEIGHT PREFIX...

    Opens no file.

    Returns:
        None if the words name text, folders or hub datasets.

    Raises:
        UsageError: a word is ambiguous or names nothing, or weights and prefixes do not alternate.
    """
    kinds = [_kind(word, flag) for word in words]
    if "prefix" not in kinds:
        if "weight" in kinds and len(words) > 1:
            other = next((w for w, kind in zip(words, kinds, strict=True) if kind != "weight"), words[0])
            raise UsageError(
                f"{flag} {other}: weights need preprocessed datasets, and there is no {other}.idx; leave them out, "
                "or run megaprune preprocess-data first"
            )
        return None
    if "other" in kinds:
        other = words[kinds.index("other")]
        raise UsageError(
            f"{flag} {other} is neither a weight nor a preprocessed dataset (there is no {other}.idx), and "
            "preprocessed datasets can't be mixed with text or hub datasets: check the path, or run megaprune "
            "preprocess-data on it"
        )
    prefixes = [_stem(word) for word, kind in zip(words, kinds, strict=True) if kind == "prefix"]
    if "weight" not in kinds:
        return Blend(prefixes, None)
    for position, (word, kind) in enumerate(zip(words, kinds, strict=True)):
        if position % 2 == 0 and kind == "prefix":
            raise UsageError(f"{flag} {word} has no weight: give one before every dataset, or none at all")
        if kind == "weight" and (position % 2 == 1 or position + 1 == len(words)):
            raise UsageError(f"{flag} {' '.join(words)}: the weight {word} is not followed by a dataset of its own")
    weights = [float(word) for word, kind in zip(words, kinds, strict=True) if kind == "weight"]
    for weight, prefix in zip(weights, prefixes, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise UsageError(f"{flag} {weight:g} {prefix}: a weight must be a number above 0")
    return Blend(prefixes, weights)


def _kind(word: str, flag: str) -> str:
    path, stem = Path(word), _stem(word)
    pair = [Path(f"{stem}.{ending}") for ending in ("bin", "idx")]
    if any(file.is_file() or file.is_symlink() for file in pair):
        if stem == word and path.exists():
            either = f"give {word}/ or {word}.idx" if path.is_dir() else f"give {word}.idx, or rename the file"
            raise UsageError(f"{flag} {word} exists, and so does the preprocessed dataset {word}.idx: {either}")
        return "prefix"
    try:
        float(word)
    except ValueError:
        return "other"
    return "other" if path.exists() else "weight"


def _stem(word: str) -> str:
    return word[:-4] if word.endswith((".bin", ".idx")) else word


def open_blend(
    blend: Blend, flag: str, seq_length: int, vocab_size: int | None, whole: bool = False
) -> list[IndexedFile]:
    """Open and check the files of a blend.

    Args:
        whole: check all tokens of large files too; needed if windows are not checked when they are read.

    Raises:
        MegapruneError: a file can't be used, is shorter than a window, or has tokens outside the vocabulary.
    """
    files = [open_indexed(prefix, flag) for prefix in blend.prefixes]
    for file in files:
        if file.num_tokens < 2 or (flag == "--train-data" and not file.num_windows(seq_length)):
            raise MegapruneError(
                f"{flag} {file.prefix} holds {file.num_tokens} tokens, but one window needs {seq_length + 1}: give "
                "more data or a smaller --seq-length"
            )
        if vocab_size is not None:
            check_vocabulary(file, vocab_size, flag, whole)
    return files


def stored_windows(
    blend: Blend, files: Sequence[IndexedFile], seq_length: int, pad_id: int, pad_last: bool, flag: str
) -> PackedDataset | JoinedWindows:
    """Return the windows of the datasets in file order. Each token except the first of a dataset is predicted once.

    Raises:
        UsageError: the blend has weights, which have no meaning here.
    """
    if blend.weights is not None:
        raise UsageError(f"{flag} takes no weights: its data is read once, in order; give only the datasets")
    parts = [PackedDataset(_stream(file), seq_length, pad_id, pad_last) for file in files]
    return parts[0] if len(parts) == 1 else JoinedWindows(parts)


def _stream(file: IndexedFile, digest: str | None = None) -> TokenStream:
    offsets, digest = np.append(file.starts // file.dtype.itemsize, file.num_tokens), digest or _digest([file])
    return TokenStream(file.tokens(), None, offsets, digest, opened_by=(_stream, (file, digest)))


def _digest(files: Sequence[IndexedFile], *more: Any) -> str:
    identity = source_identity([FileSource(path, path.name) for file in files for path in file.paths])
    return hashlib.sha256(json.dumps([identity, *more]).encode()).hexdigest()


@dataclass(frozen=True)
class IndexedWindows:
    """Samples of a blend, in the order of Megatron-Core's GPTDataset and BlendedDataset.

    Sample n is the same at every layout and after every resume.

    Args:
        dataset: maps sample numbers to tokens and labels, int64 [seq_length] each.
        name: the data, for error messages.
        fingerprint: hex digest of the files and of everything that determines the order.
    """

    dataset: Any
    num_windows: int
    seq_length: int
    pad_id: int
    vocab_size: int
    name: str
    fingerprint: str

    def __len__(self) -> int:
        return self.num_windows

    def window(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sample `index` (see `Windows.window`). The loss mask is all ones.

        Raises:
            IndexError: `index` is not in [0, len(self)).
            MegapruneError: a token is outside the model's vocabulary.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        sample = self.dataset[index]
        tokens = torch.cat([sample["tokens"], sample["labels"][-1:]]).numpy()
        check_tokens(tokens, self.vocab_size, self.name)
        return tokens, np.ones(self.seq_length, np.float32)

    def train_order(self, seed: int, start: int, count: int) -> np.ndarray:
        """Return start .. start + count - 1, int64 [count]: the seed is already part of the order."""
        return np.arange(start, start + count)


def training_windows(
    blend: Blend,
    files: Sequence[IndexedFile],
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    pad_id: int,
    vocab_size: int,
    cache_dir: Path,
    flag: str = "--train-data",
) -> IndexedWindows:
    """Return at least `num_samples` windows in Megatron's order for this seed. Collective.

    Each dataset is repeated for as many epochs as its share requires. Rank 0 writes the index files to `cache_dir` if
    they do not exist, and all ranks map them.

    Raises:
        MegapruneError: the index files can't be written, or a rank does not see them.
    """
    from megaprune.mcore import datasets, parallel

    # Without weights, the number of windows is the weight, as in Megatron.
    weights = blend.weights or [float(file.num_windows(seq_length)) for file in files]
    prefixes = [os.path.abspath(file.prefix) for file in files]
    # Rank 0's: it hashes the files or, if they are large, depends on their modification times.
    fingerprint = parallel.on_rank0_for_all(
        lambda: _digest(files, weights, num_samples, seq_length, seed, vocab_size, pad_id)
    )
    # The names of Megatron's index files depend on the paths of the data, but not on its contents.
    key = hashlib.sha256(json.dumps([prefixes, fingerprint]).encode()).hexdigest()[:32]
    folder = cache_dir.absolute() / "indexed" / key

    def blended(index_folder: Path, build: bool) -> Any:
        return datasets.blend_datasets(
            prefixes,
            weights,
            num_samples=num_samples,
            seq_length=seq_length,
            seed=seed,
            vocab_size=vocab_size,
            eod=pad_id,
            index_folder=index_folder,
            build=build,
        )

    _ensure_indices(lambda aside: blended(aside, build=True), folder)
    name = f"{flag} {' '.join(blend.prefixes)}"
    dataset = blended(folder, build=False)
    return IndexedWindows(dataset, num_samples, seq_length, pad_id, vocab_size, name, fingerprint)


def calibration_windows(
    blend: Blend, files: Sequence[IndexedFile], *, most: int, seq_length: int, seed: int, **options: Any
) -> IndexedWindows:
    """Return at most `most` windows of the blend, from one epoch of each dataset. Collective.

    Args:
        options: other arguments of `training_windows`.

    Raises:
        UsageError: a dataset is too small for its share of one window.
        MegapruneError: as `training_windows`.
    """
    from megaprune.mcore.datasets import samples_indexed

    windows = np.array([file.num_windows(seq_length) for file in files])
    weights = blend.weights or windows.astype(float).tolist()
    count = min(most, int(windows.sum()))
    while count and (samples_indexed(weights, count) > windows).any():
        count -= 1
    if not count:
        raise UsageError(
            f"--train-data {files[int(windows.argmin())].prefix} is too small for a choice of calibration windows: "
            "give more data or a smaller --seq-length"
        )
    return training_windows(
        blend, files, num_samples=count, seq_length=seq_length, seed=seed ^ CALIBRATION_STREAM, **options
    )


def _ensure_indices(build: Callable[[Path], object], folder: Path) -> None:
    """Build the index files in `folder` unless they exist, and check that every rank sees them. Collective."""
    from megaprune.mcore import parallel

    # Rank 0 draws it for all ranks: 0 if the index files exist, otherwise the suffix of the temporary folder.
    number = 0 if folder.is_dir() else random.SystemRandom().randrange(1, 1 << 62)
    number = int(parallel.broadcast_from_rank0(torch.tensor(number)))
    if number:
        aside = aside_of(folder, f"{number:x}")
        parallel.on_rank0(lambda: _make(aside))
        _build(lambda: build(aside), aside, folder)
        parallel.barrier()
    unseen = None
    if not folder.is_dir():
        unseen = MegapruneError(f"{folder} does not exist on every node: give a shared folder as --data-cache-path")
    parallel.raise_together(unseen)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise MegapruneError(f"--data-cache-path: {folder} can't be written ({error.strerror})") from error


def _build(build: Callable[[], object], aside: Path, folder: Path) -> None:
    """Write the index files to a temporary folder on rank 0 and rename it, unless another run was faster."""
    from megaprune.mcore import parallel

    try:
        build()
        if parallel.rank() == 0:
            put_in_place_once(aside, folder)
    except MegapruneError:
        raise
    except Exception as error:  # Megatron-Core wraps some OSErrors
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if not isinstance(cause, OSError):
            raise
        raise MegapruneError(f"--data-cache-path: {folder} can't be written ({cause.strerror or cause})") from error
    finally:
        if parallel.rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
