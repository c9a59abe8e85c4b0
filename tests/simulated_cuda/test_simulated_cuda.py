"""Steps of every stage on a CUDA device that is not there: tensors on one device, none on the CPU in a collective, and
a fixed number of points at which the host waits for the device.
"""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny
from tests.simulated_cuda.device_guard import build, compiler

_REASONS = {
    "no C++ compiler: install g++ or clang++, or set CXX": compiler() is None,
    "torch is built with CUDA, whose place the simulation takes": torch.backends.cuda.is_built(),
}
pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.skipif(missing, reason=reason) for reason, missing in _REASONS.items()),
]
TP2_PP2 = dict(tensor=2, pipeline=2, sequence_parallel=True)
EP2_PP2 = dict(expert=2, pipeline=2)
# model, rank, number of ranks, parallel sizes, and other arguments of `steps.training`
TRAINING = {
    "llama first rank of TP2 PP2 DP2": ("llama3", 0, 8, TP2_PP2, {}),
    "llama last rank of TP2 PP2 DP2": ("llama3", 7, 8, TP2_PP2, {}),
    "deepseek LoRA last rank of EP2 PP2": ("deepseek_v3", 3, 4, EP2_PP2, dict(lora=True)),
}
# Waits in the core's pipeline communication, of a dense model at PP 2, and for the norm of the gradients.
BY_THE_CORE = {
    **{"validation": 2, "masks": 6, "masks by cross-entropy": 4, "block influence": 2, "gradient of a mask": 5},
    **{"taylor": 3, "moments": 2, "search": 6, "search by the paper": 6, "recovery": 6, "recovery with every loss": 6},
}


def _cases(layouts, get, folder):
    return {
        name: dict(hf_model=str(get(model)), rank=rank, world_size=size, sizes=sizes, **extra)
        | dict(out=str(folder / name.replace(" ", "-")))
        for name, (model, rank, size, sizes, extra) in layouts.items()
    }


def _run(cases, folder, library):
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = tiny.environment() | {"LD_PRELOAD": str(library)}
    program = Path(__file__).with_name("steps.py")
    done = subprocess.run([sys.executable, program, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory):
    """Counts of the simulated machine, by case and part."""

    def get(model):
        return tiny_model(model, torch.bfloat16)

    folder = tmp_path_factory.mktemp("simulated")
    library, cases = build(folder), _cases(TRAINING, get, folder)
    return _run(cases, folder, library)


@pytest.mark.parametrize("case", TRAINING)
def test_all_parts_run_on_the_device(found, case):
    errors = [f"{part}:\n{result['error']}" for part, result in found[case].items() if result["error"]]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("case", TRAINING)
def test_collectives_take_tensors_of_the_device(found, case):
    assert {part: result["on_cpu"] for part, result in found[case].items() if result["on_cpu"]} == {}
    assert sum(result["collectives"] for result in found[case].values()) > 5


def _waits(result):
    """Return how often the project's own code and the core's wait for the device."""
    own = sum(count for place, count in result["syncs"].items() if " at megaprune/" in place)
    return own, sum(result["syncs"].values()) - own


def _own_waits(case):
    """Return how often the project's own code waits in each part, whatever the number of layers."""
    _, rank, size, sizes, extra = (TRAINING)[case]
    stages = sizes.get("pipeline", 1)
    # the teacher's top k, of each micro-batch, where logits are
    ranking = extra.get("micro_batches", 2) if rank >= size - size // stages else 0
    parts = 2 + extra.get("num_mtp", 0)
    fixed = {
        **{"import": 0, "fold": 0, "trainer": 0, "pruned": 0, "average": 0, "round": 0, "stop": 1},
        **{"validation": 1, "block influence": 1, "masks": 2, "masks by cross-entropy": 2},
        **{"gradient of a mask": 2, "taylor": 2, "moments": 4 if stages > 1 else 3},
    }
    steps = {"search": 2, "search by the paper": 2, "recovery": 1, "recovery with every loss": parts + 1}
    return fixed | {part: count + ranking for part, count in steps.items()}


@pytest.mark.parametrize("case", TRAINING)
def test_waits_of_the_project_s_own_code_are_counted(found, case):
    expected = _own_waits(case)
    waits = {part: _waits(result)[0] for part, result in found[case].items() if part in expected}
    assert waits == {part: count for part, count in expected.items() if part in waits}
    assert {"search", "recovery", "recovery with every loss"} <= waits.keys()


@pytest.mark.skipif(importlib.metadata.version("megatron-core") != "0.16.1", reason="counted with 0.16.1")
@pytest.mark.parametrize("case", ["llama first rank of TP2 PP2 DP2", "llama last rank of TP2 PP2 DP2"])
def test_waits_of_the_core_are_counted(found, case):
    assert {part: _waits(found[case][part])[1] for part in BY_THE_CORE} == BY_THE_CORE
