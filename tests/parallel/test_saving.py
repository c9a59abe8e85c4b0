"""Ranks share the work of saving: no buffer of the distributed optimizer is gathered, and all of them export files."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers import tiny
from tests.helpers.launch import launch_cases
from tests.parallel.saving_cases import FILE_BYTES

# processes, model, sizes, bf16; data parallelism uses the remaining processes
CASES = {
    "dp2": ("qwen3_tied", {}, False),
    "dp2_bf16": ("qwen3", {}, True),
    "ep2": ("deepseek_v3", {"expert": 2}, True),
}

# model, sizes, and whether it was trained
EXPORTS = {
    "tp2": ("qwen3_tied", {"tensor": 2}, True),
    "dp2": ("qwen3", {}, True),
    "ep2": ("deepseek_v3", {"expert": 2}, True),
    "etp1": ("qwen3_moe", {"tensor": 2, "sequence_parallel": True}, True),
    "copied": ("deepseek_v3", {}, False),
}


@pytest.fixture(scope="module")
def launched(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    cases = {
        name: dict(
            kind="saving_cases.saved_in_parts", hf_model=tiny_model(model), sizes=sizes, bf16=bf16, out=folder / name
        )
        for name, (model, sizes, bf16) in CASES.items()
    }
    for name, (model, sizes, trained) in EXPORTS.items():
        out = folder / f"export-{name}"
        cases[out.name] = dict(
            kind="saving_cases.exported", hf_model=tiny_model(model), sizes=sizes, trained=trained, out=out
        )
    return launch_cases(2, cases, folder)


@pytest.mark.parametrize("name", CASES)
def test_no_rank_gathers_or_allocates_a_buffer(launched, name):
    folder = launched.path(name)
    for rank in range(2):
        found = torch.load(folder / f"found.{rank}")
        assert found["buffer"] > 4 * found["parameter"]  # so that the two can be told apart
        assert found["communicated"] <= 1  # flags, no weights
        assert found["allocated"] <= found["parameter"]


@pytest.mark.parametrize("name", EXPORTS)
def test_all_ranks_write_a_share_of_the_export(launched, tiny_model, name):
    folder, source = launched.path(f"export-{name}"), tiny.read_tensors(tiny_model(EXPORTS[name][0]))
    found = tiny.read_tensors(folder / "hf")
    assert found.keys() == source.keys()
    assert [key for key in source if not torch.equal(found[key], source[key])] == []
    written = [int((folder / f"bytes.{rank}").read_text()) for rank in range(2)]
    assert sum(written) == sum(tensor.nbytes for tensor in source.values())
    assert min(written) > 0.3 * sum(written)
    for path in (folder / "hf").glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= FILE_BYTES or len(tensors) == 1
