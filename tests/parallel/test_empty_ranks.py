"""Runs in which a rank's optimizer holds nothing, or no expert, can be saved, resumed and finished like any other."""

import pytest
import torch

from tests.helpers import tiny
from tests.helpers.launch import launch_cases

_PP2 = ("--pipeline-model-parallel-size", "2")
_DISTRIBUTED = ("--use-distributed-optimizer",)
OPTIMIZERS = {"plain": (), "distributed": _DISTRIBUTED, "bf16": ("--bf16",)}
_ENDPOINTS = ("--recovery-layers", "endpoints")
# the model, and what is done to it: the layers that train are on the other stage, or have no experts on one stage
EMPTY = {
    "nothing_first": ("qwen3", ("--prune-layers", "4,5", *_ENDPOINTS)),
    "nothing_last": ("qwen3", ("--prune-layers", "1,2", *_ENDPOINTS)),
    "dense_first": ("deepseek_v3", ("--prune-layers", "4")),
    "dense_last": ("qwen3_moe", ("--prune-layers", "2,3")),
}
# runs that go on at another layout, where no rank's optimizer is empty, and the other way round
MOVED = {
    "to_replicas": [((*_PP2, *_DISTRIBUTED), 2), (_DISTRIBUTED, None)],
    "to_stages": [((), 2), (_PP2, None)],
}


def argv(model, data, save, flags):
    argv = [*tiny.select_argv(model, data, save, "manual", *flags), "--train-iters", "4"]
    at = argv.index("--num-layers-to-prune")
    return argv[:at] + argv[at + 2 :]


@pytest.fixture(scope="module")
def runs(tiny_model, tiny_data, tmp_path_factory):
    """Runs, each uninterrupted and in two parts."""
    folder = tmp_path_factory.mktemp("empty")
    cases = {}
    for name, (family, flags) in EMPTY.items():
        model = tiny_model(family)
        for kind, optimizer in OPTIMIZERS.items():
            whole, halves = folder / f"{name}-{kind}", folder / f"{name}-{kind}-resumed"
            flags_here = (*flags, *_PP2, *optimizer)
            cases[whole.name] = dict(kind="prune", argv=argv(model, tiny_data, whole, flags_here))
            again = argv(model, tiny_data, halves, flags_here)
            cases[halves.name] = dict(kind="interrupted_prune", stops=[(again, 2), (again, None)])
    family, flags = EMPTY["nothing_first"]
    for name, goes in MOVED.items():
        stops = [(argv(tiny_model(family), tiny_data, folder / name, (*flags, *at)), stop) for at, stop in goes]
        cases[name] = dict(kind="interrupted_prune", stops=stops)
    return launch_cases(2, cases, folder)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("name", EMPTY)
def test_resumed_run_ends_in_the_same_bits(runs, tiny_model, name, kind):
    whole, resumed = (tiny.read_tensors(runs.path(f"{name}-{kind}{end}") / "hf") for end in ("", "-resumed"))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    source = tiny.read_tensors(tiny_model(EMPTY[name][0]))
    assert any(not torch.equal(tensor, source[key]) for key, tensor in whole.items() if "layers.0." in key) == (
        name != "nothing_first"
    )


@pytest.mark.parametrize("name", MOVED)
def test_run_goes_on_at_a_layout_with_other_empty_ranks(runs, name):
    expected, moved = (tiny.read_tensors(runs.path(which) / "hf") for which in ("nothing_first-plain", name))
    assert expected.keys() == moved.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(moved[key], tensor, atol=1e-3, rtol=1e-3, msg=key)
