"""A run with LoRA gives the same model at every layout, with either teacher, stopped or not; its checkpoints contain
only adapters.
"""

import json
import math

import pytest
import torch
from megatron.core import dist_checkpointing

from megaprune.mcore import checkpoint
from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.helpers.launch import launch_cases
from tests.parallel import cases
from tests.parallel.lora_cases import LAYOUTS, argv


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_data, folder):
    """Return a function that gives a run on this process, once per family and flags."""

    def get(family, *flags):
        save = folder / "-".join(["alone", family, *flags])
        if not save.exists():
            tiny.run_here(argv(tiny_model(family), tiny_data, save, *flags))
        return save

    return get


@pytest.fixture(scope="module")
def at_layout(tiny_model, tiny_data, folder):
    """Return a function that gives the run at a layout, from one launch per number of processes."""
    launched = {}

    def get(layout):
        num_processes = LAYOUTS[layout][1]
        if num_processes not in launched:
            together = folder / f"processes{num_processes}"
            together.mkdir()
            cases = {
                name: dict(kind="lora_cases.prune", argv=argv(tiny_model(family), tiny_data, together / name, *flags))
                for name, (family, processes, flags) in LAYOUTS.items()
                if processes == num_processes
            }
            launched[num_processes] = launch_cases(num_processes, cases, together)
        return launched[num_processes].path(layout)

    return get


def report(run):
    return json.loads((run / "report.json").read_text())


def assert_same_course(run, other, rel):
    assert report(run)["kept_layers"] == report(other)["kept_layers"]
    assert report(run)["scores"] == pytest.approx(report(other)["scores"], rel=1e-3)
    for model, loss in report(other)["valid"].items():
        assert report(run)["valid"][model]["loss"] == pytest.approx(loss["loss"], rel=rel), model
    for record, wanted in zip(read_metrics(run), read_metrics(other), strict=True):
        assert record.get("mask") == wanted.get("mask")
        for key in ("loss", "grad_norm", "lr"):
            # the first step distills the original model from itself, so its loss is rounding noise
            assert record[key] == pytest.approx(wanted[key], rel=rel, abs=1e-5), (key, record["iteration"])


def with_adapter(run):
    """Return the weights of the pruned model, with separate experts, and its adapter merged into them."""
    weights, adapter = tiny.read_tensors(run / "hf"), tiny.read_tensors(run / "adapter")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    for name in [name for name in adapter if name.endswith("lora_A.weight") and "mlp.experts." not in name]:
        weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
        delta = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
        weights[weight] += config["lora_alpha"] / config["r"] * delta
    return {name: weight for name, weight in weights.items() if ".experts." not in name}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_is_the_same_at_every_layout(at_layout, alone, layout):
    run, other = at_layout(layout), alone(LAYOUTS[layout][0])
    assert_same_course(run, other, rel=1e-3)
    weights = with_adapter(run) if (run / "adapter").exists() else tiny.read_tensors(run / "hf")
    expected = tiny.read_tensors(other / "hf")
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=2e-3, rtol=1e-3, msg=name)
    assert (run / "adapter").exists() or weights.keys() == expected.keys()


@pytest.mark.parametrize("family", ["qwen3_tied", "deepseek_v3"])
def test_run_moves_what_it_should(alone, family, tiny_model):
    """Ensure that the comparisons of this file would notice a run in which nothing changes."""
    run = alone(family)
    losses, valid = [record["loss"] for record in read_metrics(run)], report(run)["valid"]
    assert max(losses) > 1.05 * min(losses) > 0.1  # cross-entropy with the data's own noise is half of it
    assert valid["recovered"]["loss"] < valid["pruned"]["loss"] - 0.1
    trained, original = tiny.read_tensors(run / "hf"), tiny.read_tensors(tiny_model(family))
    assert report(run)["kept_layers"][0] == 0
    moved = {
        name for name, tensor in trained.items() if "layers.0." in name and not torch.equal(tensor, original[name])
    }
    assert moved == {name for name in trained if "layers.0." in name and "_proj" in name}


def test_exported_base_is_the_pruned_source(at_layout, tiny_model):
    run = at_layout("tp2_sp_pp2_ep2_adapter")
    base, source = tiny.read_tensors(run / "hf"), tiny.read_tensors(tiny_model("deepseek_v3"))
    kept = report(run)["kept_layers"]
    for name, tensor in base.items():
        prefix, layer, rest = name.partition("layers.")
        number, _, rest = rest.partition(".")
        assert torch.equal(tensor, source[f"{prefix}layers.{kept[int(number)]}.{rest}" if layer else name]), name
    assert "with its adapter" in (run / "hf" / "README.md").read_text()
    assert not list(run.glob("*.tmp"))


def test_online_and_self_teachers_give_the_same_run(alone):
    """One trains the pruned model, the other bypasses the pruned layers of the whole model."""
    assert_same_course(alone("deepseek_v3", "--teacher", "online"), alone("deepseek_v3"), rel=1e-4)


@pytest.fixture(scope="module")
def interrupted(tiny_model, tiny_data, folder):
    """Run that was stopped in the search and in recovery."""
    save = folder / "interrupted"
    arguments = argv(tiny_model("deepseek_v3"), tiny_data, save)
    cases.interrupted_prune([[arguments, 2], [arguments, 2], [arguments, None]])
    return save


def test_resumed_run_ends_in_the_same_bits(interrupted, alone):
    other = alone("deepseek_v3")
    tensors, expected = tiny.read_tensors(interrupted / "hf"), tiny.read_tensors(other / "hf")
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    for record, wanted in zip(read_metrics(interrupted), read_metrics(other), strict=True):
        assert tiny.steady(record) == tiny.steady(wanted)


@pytest.mark.parametrize("flags", [(), ("--teacher", "online")], ids=["self", "online"])
def test_checkpoints_hold_adapters_alone(alone, flags):
    saved = checkpoint.latest(alone("deepseek_v3", *flags) / "checkpoints")
    tensors = dist_checkpointing.load_tensors_metadata(str(saved))
    assert [key for key in tensors if ".lora_" not in key] == []
    adapters = {key for key in tensors if key.endswith((".lora_a", ".lora_b")) and not key.startswith("optimizer.")}
    assert any("experts" in key for key in adapters)
    sizes = {key: math.prod(tensor.global_shape) for key, tensor in tensors.items()}
    # with Adam's two moments of each
    assert sum(sizes.values()) == 3 * sum(sizes[key] for key in adapters)
