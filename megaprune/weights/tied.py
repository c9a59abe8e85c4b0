"""Tied embeddings, checked: a config that ties them says nothing of what is stored."""

import json
from pathlib import Path

_BLOCK = 32 * 2**20


def same_tensor(first: tuple[Path, str], second: tuple[Path, str]) -> bool:
    """Whether two tensors, each by its safetensors file and its name there, are equal bit for bit."""
    (dtype, shape, *a), (other_dtype, other_shape, *b) = (_entry(*place) for place in (first, second))
    if dtype != other_dtype or shape != other_shape:
        return False
    length = a[1] - a[0]
    with first[0].open("rb") as one, second[0].open("rb") as two:
        for at in range(0, length, _BLOCK):
            count = min(_BLOCK, length - at)
            one.seek(a[0] + at)
            two.seek(b[0] + at)
            if one.read(count) != two.read(count):
                return False
    return True


def _entry(path: Path, name: str) -> tuple[str, list[int], int, int]:
    """A tensor's dtype, shape, and its first and last byte in the file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin, end = header[name]["data_offsets"]
        return header[name]["dtype"], header[name]["shape"], file.tell() + begin, file.tell() + end
