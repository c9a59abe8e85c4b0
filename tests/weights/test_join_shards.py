import pytest
import torch
from safetensors import safe_open

from megaprune.utils.errors import MegapruneError
from megaprune.weights.writer import ShardWriter, join_shards


def write(folder, tensors, writer):
    shards = ShardWriter(folder, 100, writer)
    for name, tensor in tensors.items():
        shards.add(name, tensor)
    return shards.close()


def test_joined_file_holds_every_tensor_of_its_parts(tmp_path):
    tensors = {f"t{i}": torch.randn(3, i + 1).to(dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16] * 8)}
    names = list(tensors)
    parts = [write(tmp_path, {name: tensors[name] for name in names[i::2]}, writer=i) for i in range(2)]
    assert sum(map(len, parts)) > 4
    join_shards(tmp_path, parts[0] + parts[1], "whole.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["whole.safetensors"]
    with safe_open(tmp_path / "whole.safetensors", framework="pt") as whole:
        assert set(whole.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(whole.get_tensor(name), tensor)


def test_tensor_that_two_parts_hold_is_refused(tmp_path):
    parts = [write(tmp_path, {"t": torch.zeros(2)}, writer=i) for i in range(2)]
    with pytest.raises(MegapruneError, match="t was exported twice"):
        join_shards(tmp_path, parts[0] + parts[1], "whole.safetensors")
