"""Steps and checkpoints through Megatron-Core's spec for Transformer Engine, on gloo, with a stand-in for the package.

The stand-in proves what the meta device can't: losses, gradients, and the modules' extra states in checkpoints. Its
names and shapes are those that `test_names.py` compares with the real package.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.launch import launch_cases

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="the real package is there"),
]
STAND_IN = Path(__file__).parents[1] / "helpers" / "stand_in"
TP2_SP = dict(tensor=2, sequence_parallel=True)
CASES = {
    "qwen3-tp2-sp": ("qwen3", TP2_SP),
    "qwen2-tp2": ("qwen2", dict(tensor=2)),
    "qwen3_moe-ep2": ("qwen3_moe", dict(expert=2)),
    "qwen3_moe-tp2-sp-etp2": ("qwen3_moe", TP2_SP | dict(expert_tensor=2)),
}


@pytest.fixture(scope="module")
def fused(tiny_model, tmp_path_factory):
    """Results of two processes with the stand-in."""
    folder = tmp_path_factory.mktemp("te")
    cases = {
        name: dict(kind="te_cases.steps", hf_model=str(tiny_model(family)), sizes=sizes, te=True)
        | dict(out=str(folder / name))
        for name, (family, sizes) in CASES.items()
    }
    for name in cases:
        (folder / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(STAND_IN))
        return launch_cases(2, cases, folder)


@pytest.fixture(scope="module")
def local(tiny_model, tmp_path_factory):
    """Return a function that gives the results of a family's own layers on one process."""
    from tests.parallel import te_cases

    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            te_cases.steps(str(tiny_model(family)), {}, False, str(made[family]))
        return made[family]

    return get


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_project_s_own_layers(fused, local, name):
    found, expected = torch.load(fused.path(name) / "steps.pt"), torch.load(local(CASES[name][0]) / "steps.pt")
    for step, wanted in zip(found, expected, strict=True):
        assert step == pytest.approx(wanted, rel=1e-3)
    # the third step, by the trainer that went on and by the one that was loaded
    assert found[2] == pytest.approx(found[3], rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_layers_are_those_of_transformer_engine(fused, name):
    names = torch.load(fused.path(name) / "names.pt")
    assert any(name.endswith("linear_qkv.layer_norm_weight") for name in names)
    assert any(".experts.linear_fc1.weight" in name for name in names) == ("moe" in name)


@pytest.mark.parametrize("name", CASES)
def test_export_is_that_of_the_project_s_own_layers(fused, local, name):
    found, expected = (tiny.read_tensors(f / "hf") for f in (fused.path(name), local(CASES[name][0])))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, atol=5e-3, rtol=1e-2, msg=key)
