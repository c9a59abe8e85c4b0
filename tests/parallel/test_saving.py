"""With the distributed optimizer, a rank saves and loads its own part alone: no buffer is gathered."""

import pytest
import torch

from tests.helpers.launch import launch_cases

# processes, model, sizes, bf16; data parallelism uses the remaining processes
CASES = {
    "dp2": ("qwen3_tied", {}, False),
    "dp2_bf16": ("qwen3", {}, True),
    "ep2": ("deepseek_v3", {"expert": 2}, True),
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
    return launch_cases(2, cases, folder)


@pytest.mark.parametrize("name", CASES)
def test_no_rank_gathers_or_allocates_a_buffer(launched, name):
    folder = launched.path(name)
    for rank in range(2):
        found = torch.load(folder / f"found.{rank}")
        assert found["buffer"] > 4 * found["parameter"]  # so that the two can be told apart
        assert found["communicated"] <= 1  # flags, no weights
        assert found["allocated"] <= found["parameter"]
