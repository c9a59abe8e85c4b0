"""Compares two HF folders tensor by tensor, in constant memory."""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from megaprune.utils.progress import bars_are_shown
from megaprune.weights.safetensors_io import TensorFiles
from megaprune.weights.source import HFSource

_BLOCK_BYTES = 32 * 2**20


def verify(first: HFSource, second: HFSource) -> tuple[int, list[str]]:
    """How many tensors are equal bit for bit in both folders, and a line for each that is not."""
    names = (first.stored_files, second.stored_files)
    differences = [f"{name} is in {first.folder} only" for name in names[0] if name not in names[1]]
    differences += [f"{name} is in {second.folder} only" for name in names[1] if name not in names[0]]
    files = TensorFiles()
    common = [name for name in names[0] if name in names[1]]
    equal = 0
    for name in tqdm(common, unit=" tensors", dynamic_ncols=True, disable=not bars_are_shown()):
        places = [(source.stored_files[name], name) for source in (first, second)]
        described = [files.describe(*place) for place in places]
        if described[0] != described[1]:
            shown = " and ".join(f"{dtype} {shape}" for dtype, shape in described)
            differences.append(f"{name} is stored as {shown}")
            continue
        at = _first_difference(*(_blocks(files, *place) for place in places))
        if at is None:
            equal += 1
        else:
            differences.append(f"{name} differs, first in byte {at:,} of its data")
    files.close()
    return equal, differences


def _blocks(files: TensorFiles, path: Path, name: str) -> Iterator[bytes]:
    begin, end = files.place(path, name)
    for start in range(begin, end, _BLOCK_BYTES):
        yield files.bytes_at(path, start, min(end, start + _BLOCK_BYTES) - start)


def _first_difference(first: Iterator[bytes], second: Iterator[bytes]) -> int | None:
    done = 0
    for a, b in zip(first, second, strict=True):
        if a != b:
            return done + next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        done += len(a)
    return None
