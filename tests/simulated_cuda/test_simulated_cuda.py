"""Steps of every stage on a CUDA device that is not there: tensors on one device, none on the CPU in a collective, and a
fixed number of points at which the host waits for the device.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny
from tests.simulated_cuda.library import build, compiler

_STAND_IN = Path(__file__).parents[1] / "helpers" / "stand_in"
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
    "llama last rank with 4 micro-batches": ("llama3", 7, 8, TP2_PP2, dict(micro_batches=4)),
    "deepseek LoRA first rank of EP2 PP2": ("deepseek_v3", 0, 4, EP2_PP2, dict(lora=True)),
    "deepseek LoRA last rank of EP2 PP2": ("deepseek_v3", 3, 4, EP2_PP2, dict(lora=True)),
    "openpangu of ETP2": ("pangu_ultra_moe", 1, 2, dict(tensor=2, sequence_parallel=True, expert_tensor=2), {}),
    "mtp last rank of TP2 EP2 PP2": ("mtp", 7, 8, TP2_PP2 | dict(expert=2), dict(num_mtp=1, recompute="full")),
}
WITH_TE = {"qwen3 with Transformer Engine": ("qwen3", 3, 4, dict(tensor=2, sequence_parallel=True), dict(te=True))}
# Host waits of the project's own code and of the core, in a step that repeats.
SYNCS: dict[str, dict[str, tuple[int, int]]] = {}


def _cases(layouts, get, folder):
    return {
        name: dict(kind="training", hf_model=str(get(model)), rank=rank, world_size=size, sizes=sizes, **extra)
        | dict(out=str(folder / name.replace(" ", "-")))
        for name, (model, rank, size, sizes, extra) in layouts.items()
    }


def _run(cases, folder, library, *paths):
    (folder / "cases.json").write_text(json.dumps(cases))
    environment = tiny.environment() | {"LD_PRELOAD": str(library)}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment["PYTHONPATH"]])
    program = Path(__file__).with_name("steps.py")
    done = subprocess.run([sys.executable, program, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tiny_model, tiny_data, tmp_path_factory):
    """What the machine has seen, by case and part."""
    from tests.helpers import mtp

    made = {"mtp": lambda: mtp.make_model(tmp_path_factory.mktemp("mtp"))}

    def get(model):
        return made[model]() if model in made else tiny_model(model, torch.bfloat16)

    folder = tmp_path_factory.mktemp("simulated")
    library, cases = build(folder), _cases(TRAINING, get, folder)
    data = str(tiny_data / "train.jsonl")
    cases["evaluation"] = dict(kind="evaluation", hf_model=str(get("llama3")), data=data)
    for name, sizes in {"caching": {}, "caching at TP2": dict(tensor=2, sequence_parallel=True)}.items():
        flags = {"tensor_model_parallel_size": 2, "sequence_parallel": True} if sizes else {}
        given = dict(hf_model=str(get("qwen3")), data=data, flags=flags, sizes=sizes, out=str(folder / name))
        cases[name] = dict(kind="teacher_caching", world_size=2 if sizes else 1, **given)
    result = _run(cases, folder, library)
    with_te = tmp_path_factory.mktemp("simulated-te")
    return result | _run(_cases(WITH_TE, get, with_te), with_te, library, _STAND_IN)


ALL = (*TRAINING, *WITH_TE, "evaluation", "caching", "caching at TP2")


@pytest.mark.parametrize("case", ALL)
def test_all_parts_run_on_the_device(found, case):
    errors = [f"{part}:\n{result['error']}" for part, result in found[case].items() if result["error"]]
    assert not errors, "\n".join(errors)


@pytest.mark.parametrize("case", ALL)
def test_collectives_take_tensors_of_the_device(found, case):
    assert {part: result["on_cpu"] for part, result in found[case].items() if result["on_cpu"]} == {}
    if case not in ("evaluation", "caching"):
        assert sum(result["collectives"] for result in found[case].values()) > 5


def _waits(result):
    """Return how often the project's own code and the core's wait for the device."""
    own = sum(count for place, count in result["syncs"].items() if " at megaprune/" in place)
    return own, sum(result["syncs"].values()) - own


@pytest.mark.parametrize("case", [*TRAINING, *WITH_TE])
def test_host_waits_are_counted(found, case):
    expected, by_the_core = SYNCS[case], importlib.metadata.version("megatron-core") == "0.16.1"
    waits = {part: _waits(result) for part, result in found[case].items() if part in expected}
    if not by_the_core:  # another version may wait at other places
        waits = {part: (own, expected[part][1]) for part, (own, _) in waits.items()}
    assert waits == expected


def test_host_waits_do_not_grow_with_the_micro_batches(found):
    two, four = (found[f"llama last rank {name}"] for name in ("of TP2 PP2 DP2", "with 4 micro-batches"))
    for part in ("search", "recovery", "recovery with every loss", "masks", "block influence"):
        assert _waits(two[part]) == _waits(four[part]), part
