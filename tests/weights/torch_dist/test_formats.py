"""Files written without torch equal those that torch writes, and torch reads them."""

import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megaprune.weights.dtypes import TORCH_NAMES
from megaprune.weights.torch_dist import saved_tensor
from megaprune.weights.torch_dist.chunks import Chunk, Place, StoredTensor
from megaprune.weights.torch_dist.metadata import read_metadata, write_metadata
from megaprune.weights.torch_dist.saved_tensor import around, data_offset
from tests.helpers import tiny
from tests.helpers.converting import done

SHAPES = [(), (0,), (7,), (3, 300), (2, 0, 3), (2, 70000), (2, 3, 4)]


@pytest.mark.parametrize("dtype", saved_tensor.STORAGES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_tensor_is_read_by_torch(dtype, shape):
    tensor = torch.randint(0, 2, shape).to(getattr(torch, TORCH_NAMES[dtype]))
    before, behind = around(shape, dtype)
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    file = io.BytesIO(before + data + behind)
    for safely in (True, False):
        file.seek(0)
        found = torch.load(file, weights_only=safely)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
    assert len(before) % 64 == 0
    whole = file.getvalue()
    assert data_offset(file, 0, len(whole), tuple(shape), len(data)) == len(before)


def test_a_tensor_that_torch_saved_is_found():
    tensor, file = torch.randn(5, 3), io.BytesIO()
    file.write(b"other")
    saved = io.BytesIO()
    torch.save(tensor, saved)
    file.write(saved.getvalue())
    at = 5 + data_offset(file, 5, len(saved.getvalue()), (5, 3), 60)
    assert file.getvalue()[at : at + 60] == tensor.numpy().tobytes()


def test_a_tensor_above_4_gb(tmp_path):
    size = 5 * 2**30
    before, behind = around((size,), "U8")
    with (tmp_path / "large").open("w+b", buffering=0) as file:  # sparse
        file.write(before)
        file.seek(size - 3, io.SEEK_CUR)
        file.write(b"\1\2\3" + behind)
        length = file.tell()
        assert data_offset(file, 0, length, (size,), size) == len(before)
    found = torch.load(tmp_path / "large", mmap=True)
    assert found.shape == (size,) and found[-3:].tolist() == [1, 2, 3]


def test_metadata_is_that_of_torch(tmp_path):
    tensors = {
        "a.weight": StoredTensor(
            (300, 70000),
            "BF16",
            (
                Chunk((0, 0), (100, 70000), Place("__0_0.distcp", 0, 5_000_000_000)),
                Chunk((100, 0), (200, 70000), Place("__1_0.distcp", 2**40, 77)),
            ),
        ),
        "ä": StoredTensor((), "F32", (Chunk((), (), Place("__1_0.distcp", 3, 4)),)),
        "c": StoredTensor((0, 2), "I64", (Chunk((0, 0), (0, 2), Place("__1_0.distcp", 9, 4)),)),
    }
    write_metadata(tmp_path, tensors)
    described, places = {}, {}
    for key, tensor in tensors.items():
        chunks = [ChunkStorageMetadata(torch.Size(c.offset), torch.Size(c.shape)) for c in tensor.chunks]
        properties = TensorProperties(dtype=getattr(torch, TORCH_NAMES[tensor.dtype]))
        described[key] = TensorStorageMetadata(properties, torch.Size(tensor.size), chunks)
        for number, chunk in enumerate(tensor.chunks):
            place = _StorageInfo(chunk.place.file, chunk.place.offset, chunk.place.length)
            places[MetadataIndex(key, torch.Size(chunk.offset), number)] = place
    expected = Metadata(described, storage_data=places)
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert found == expected and vars(found) == vars(expected)
    assert [(k.index, type(k.offset)) for k in found.storage_data] == [(k.index, type(k.offset)) for k in places]
    assert read_metadata(tmp_path) == tensors
    (tmp_path / ".metadata").write_bytes(pickle.dumps(expected))
    assert read_metadata(tmp_path) == tensors
    assert torch.load(tmp_path / "common.pt") == {"checkpoint_version": 3.0, "iteration": 0}


def test_moving_bytes_does_not_wait_for_torch(models, tmp_path):
    script = (
        "import sys; from megaprune.cli import main as cli; status = cli.attempt('convert', sys.argv[1:]); "
        "assert status == (0, None), status; assert 'torch' not in sys.modules"
    )
    for words in (
        ["import", "--hf-model", models("llama3"), "--megatron-path", tmp_path / "m"],
        ["export", "--megatron-path", tmp_path / "m", "--hf-path", tmp_path / "hf"],
    ):
        ran = subprocess.run([sys.executable, "-c", script, *words], env=tiny.environment(), stderr=subprocess.PIPE)
        assert ran.returncode == 0, ran.stderr.decode()
    done("verify", "--hf-model", models("llama3"), "--hf-path", tmp_path / "hf")
