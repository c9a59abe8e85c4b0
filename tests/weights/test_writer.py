"""Folders of safetensors: files of bounded size, a correct index, no incomplete files."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.weights.byte_ranges import Buffer
from megaprune.weights.dtypes import TORCH_NAMES
from megaprune.weights.reader import TensorFiles
from megaprune.weights.stored_layout import Place
from megaprune.weights.writer import ShardWriter, finish_shards, parse_size
from tests.helpers.checkpoints import read_index

TENSORS = {f"t{number}": torch.full((25,), float(number)) for number in range(10)}  # 100 bytes each


def write(folder, max_shard_bytes, tensors=TENSORS):
    writer = ShardWriter(folder, max_shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    finish_shards(folder, writer.close())
    return sorted(path.name for path in folder.iterdir())


def test_one_file_has_no_index(tmp_path):
    assert write(tmp_path, 1000) == ["model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == TENSORS.keys()
    assert all(torch.equal(stored[name], TENSORS[name]) for name in TENSORS)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}  # transformers refuses a file without it


@pytest.mark.parametrize("size, files", [(999, 2), (500, 2), (499, 3), (300, 4), (100, 10), (1, 10)])
def test_files_respect_the_size(tmp_path, size, files):
    names = write(tmp_path, size)
    numbered = [f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)]
    assert names == [*numbered, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 1000
    assert set(index["weight_map"]) == set(TENSORS)
    for name in numbered:
        stored = load_file(tmp_path / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == stored.keys()
        # a tensor larger than the size has a file of its own
        assert sum(t.nbytes for t in stored.values()) <= size or len(stored) == 1


def test_total_size_counts_bytes_of_each_dtype(tmp_path):
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.ones(2, dtype=torch.int64)}
    write(tmp_path, 1, tensors)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 60 + 14 + 16


def test_views(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    write(tmp_path, 10**6, {"transposed": whole.t(), "column": whole[:, 1]})
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["transposed"], whole.t()) and torch.equal(stored["column"], whole[:, 1])


def of_every_dtype():
    dtypes = [getattr(torch, name) for name in TORCH_NAMES.values()]
    return {f"{x}.{number}": torch.ones(3, 5).to(dtype) for x in "ba" for number, dtype in enumerate(dtypes)}


def test_the_same_bytes_as_safetensors_own_writer(tmp_path):
    tensors = of_every_dtype() | {"scalar": torch.tensor(2.0), "none": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", 10**6, tensors)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()


def test_ranges_of_other_files(tmp_path):
    tensors, whole, files = of_every_dtype(), tmp_path / "whole.safetensors", TensorFiles()
    save_file(tensors, whole, metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    writer = ShardWriter(tmp_path / "out", 10**6)
    for name in tensors:
        dtype, shape = files.describe(whole, name)
        writer.add_ranges(name, shape, dtype, [files.where(whole, Place(name))])
    finish_shards(tmp_path / "out", writer.close())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("dim, start, stop", [(0, 2, 5), (0, 5, None), (0, 3, 3), (1, 1, 4), (1, 3, None), (1, 2, 2)])
def test_slices_are_read_as_torch_cuts_them(tmp_path, dim, start, stop):
    tensor, path, files = torch.randn(7, 5), tmp_path / "one.safetensors", TensorFiles()
    save_file({"t": tensor}, path)
    cut = slice(start, stop)
    found = files.read_slice(path, Place("t"), (7, 5), dim, start, stop)
    assert torch.equal(found, tensor[cut] if dim == 0 else tensor[:, cut])
    assert torch.equal(files.read(path, Place("t"), (7, 5), Buffer()), tensor)


def test_several_writers_share_a_folder(tmp_path):
    shards = []
    for rank in (1, 0):
        writer = ShardWriter(tmp_path, 150, writer=rank)
        writer.add(f"a{rank}", torch.ones(25))
        writer.add(f"b{rank}", torch.ones(25))
        shards += writer.close()
    finish_shards(tmp_path, shards)
    assert set(read_index(tmp_path)) == {"a0", "b0", "a1", "b1"}
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert not list(tmp_path.glob("part-*"))


def test_a_tensor_twice(tmp_path):
    shards = []
    for rank in (0, 1):
        writer = ShardWriter(tmp_path, 100, writer=rank)
        writer.add("same", torch.ones(25))
        shards += writer.close()
    with pytest.raises(MegapruneError, match="same was exported twice"):
        finish_shards(tmp_path, shards)


def test_closing_twice_writes_once(tmp_path):
    writer = ShardWriter(tmp_path, 1000)
    writer.add("a", torch.ones(3))
    assert writer.close() == writer.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_files_are_as_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        write(tmp_path, 300)
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in tmp_path.iterdir()} == {"0o644"}


@pytest.mark.parametrize(
    "text, size", [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5gb", 15 * 10**8), ("100 KB", 10**5), ("1TB", 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "5 G", "-1GB", "0GB", "nanGB", "infGB", "1e999GB", "5GiB", "big"])
def test_sizes_that_are_none(text):
    with pytest.raises(UsageError) as caught:
        parse_size(text)
    assert str(caught.value) == f"--max-shard-size {text!r} is not a size such as 500MB or 5GB"
