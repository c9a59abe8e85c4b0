"""A whole run gives the same model at every parallel layout, stopped and resumed or not."""

import json

import pytest
import torch

from megaprune.models.sizes import layer_sizes
from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.parallel import cases
from tests.parallel.layouts import (
    ENDPOINT_LAYOUTS,
    HEALED_LAYOUTS,
    MOE_RUN_LAYOUTS,
    ROUNDS_LAYOUTS,
    RUN_LAYOUTS,
    SELECT_LAYOUTS,
    SELECTING,
    SHEARED_LAYOUTS,
    STITCH_LAYOUTS,
)


def report(run):
    return json.loads((run / "report.json").read_text())


def assert_same_up_to_rounding(run, other, iterations=20):
    expected, found = report(other), report(run)
    assert found["kept_layers"] == expected["kept_layers"]
    assert found["scores"] == (expected["scores"] and pytest.approx(expected["scores"], rel=1e-3))
    for model, loss in expected["valid"].items():
        assert found["valid"][model]["loss"] == pytest.approx(loss["loss"], rel=1e-3), model
    records, expected_records = read_metrics(run), read_metrics(other)
    assert len(records) == len(expected_records) == iterations
    for record, wanted in zip(records, expected_records, strict=True):
        assert record["iteration"] == wanted["iteration"]
        assert record.get("mask") == wanted.get("mask")
        for key in ("loss", "grad_norm", "lr"):
            # the first step distills the original model from itself, so its loss is rounding noise
            assert record[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), (key, record["iteration"])
    tensors, wanted = tiny.read_tensors(run / "hf"), tiny.read_tensors(other / "hf")
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, atol=2e-3, rtol=1e-3, msg=name)


@pytest.mark.parametrize("layout", RUN_LAYOUTS)
def test_run_is_the_same_at_every_layout(results, whole_run, layout):
    assert_same_up_to_rounding(results(RUN_LAYOUTS[layout][0]).path(f"run-{layout}"), whole_run)


@pytest.fixture(scope="module")
def healed_alone(tiny_model, tiny_data, tmp_path_factory):
    save = tmp_path_factory.mktemp("healed") / "run"
    tiny.run_here(tiny.healed_argv(tiny_model("qwen3_tied"), tiny_data, save))
    return save


@pytest.mark.parametrize("layout", HEALED_LAYOUTS)
def test_candidates_are_healed_alike_at_every_layout(results, healed_alone, layout):
    run = results(2).path(f"run-{layout}")
    assert_same_up_to_rounding(run, healed_alone, iterations=8)
    losses = [[c.get("healed_loss") for c in report(folder)["candidates"]] for folder in (run, healed_alone)]
    assert sum(loss is not None for loss in losses[1]) == 2
    assert losses[0] == [loss and pytest.approx(loss, rel=1e-4) for loss in losses[1]]


@pytest.mark.parametrize("layout", ROUNDS_LAYOUTS)
def test_rounds_are_the_same_at_every_layout(results, tiny_model, tiny_data, tmp_path, layout):
    tiny.run_here(tiny.rounds_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run"))
    assert_same_up_to_rounding(results(2).path(f"run-{layout}"), tmp_path / "run", iterations=4)


@pytest.mark.parametrize("layout", STITCH_LAYOUTS)
def test_a_stitch_is_the_same_at_every_layout(results, tiny_model, tiny_data, tmp_path, layout):
    family, gone, _ = STITCH_LAYOUTS[layout]
    tiny.run_here(tiny.stitched_argv(tiny_model(family), tiny_data, tmp_path / "run", gone))
    assert report(tmp_path / "run")["valid"]["pruned"] != report(tmp_path / "run")["valid"]["stitched"]
    assert_same_up_to_rounding(results(2).path(f"run-{layout}"), tmp_path / "run", iterations=0)


@pytest.fixture(scope="module")
def whole_moe_run(tiny_model, tiny_data, tmp_path_factory):
    save = tmp_path_factory.mktemp("moe") / "run"
    tiny.run_here(tiny.moe_prune_argv(tiny_model("deepseek_v3"), tiny_data, save))
    return save


@pytest.mark.parametrize("layout", MOE_RUN_LAYOUTS)
def test_moe_run_is_the_same_at_every_layout(results, whole_moe_run, layout):
    assert_same_up_to_rounding(results(MOE_RUN_LAYOUTS[layout][0]).path(f"run-{layout}"), whole_moe_run)


def test_moe_run_prunes_to_its_parameters(whole_moe_run, tiny_model):
    """Dense and MoE layers have different sizes. The model is within the limit, and no removed layer would fit."""
    argv, found = json.loads((whole_moe_run / "run.json").read_text()), report(whole_moe_run)
    sizes = [size.total for size in layer_sizes(json.loads((tiny_model("deepseek_v3") / "config.json").read_text()))]
    limit, after = argv["target_params"], found["params_after"]
    assert after <= limit < after + min(sizes[layer] for layer in found["pruned_layers"])
    assert after == sum(tensor.numel() for tensor in tiny.read_tensors(whole_moe_run / "hf").values())
    kinds = [found["layer_kinds_before"], found["layer_kinds_after"]]
    assert kinds[0] == {"dense": 2, "moe": 3}
    assert kinds[1] == {
        "dense": sum(layer < 2 for layer in found["kept_layers"]),
        "moe": sum(layer >= 2 for layer in found["kept_layers"]),
    }
    config = json.loads((whole_moe_run / "hf" / "config.json").read_text())
    assert config["first_k_dense_replace"] == kinds[1]["dense"]
    assert found["active_params_after"] < found["params_after"]
    tiny.load_hf(whole_moe_run / "hf")


@pytest.fixture(scope="module")
def selecting_alone(tiny_model, tiny_data, tmp_path_factory):
    """Return a function that gives the report of a method's choice on one process."""
    made = {}

    def get(method):
        if method not in made:
            save = tmp_path_factory.mktemp(method) / "run"
            argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, save, method, *SELECTING[method])
            cases.prune_any_candidate(argv)
            made[method] = report(save)
        return made[method]

    return get


@pytest.mark.parametrize("layout", SELECT_LAYOUTS)
@pytest.mark.parametrize("method", SELECTING)
def test_calibrated_methods_choose_the_same_at_every_layout(results, selecting_alone, method, layout):
    found, expected = report(results(2).path(f"run-{method}-{layout}")), selecting_alone(method)
    assert found["kept_layers"] == expected["kept_layers"]
    if expected["scores"] is not None:
        assert found["scores"] == pytest.approx(expected["scores"], rel=1e-3)
    for candidate, wanted in zip(found.get("candidates", []), expected.get("candidates", []), strict=True):
        near = {key: pytest.approx(wanted[key], rel=1e-3) for key in ("kl", "stitched_loss") if key in wanted}
        assert candidate == wanted | near | {"tokens": candidate["tokens"]}
    compared = sum("stitched_loss" in candidate for candidate in expected.get("candidates", []))
    assert (compared > 1) == (method == "auto")


@pytest.fixture(scope="module")
def endpoints_alone(tiny_model, tiny_data, tmp_path_factory):
    save = tmp_path_factory.mktemp("endpoints") / "run"
    tiny.run_here(tiny.endpoint_argv(tiny_model("qwen3_tied"), tiny_data, save))
    return save


@pytest.mark.parametrize("layout", ENDPOINT_LAYOUTS)
def test_endpoint_tuning_is_the_same_at_every_layout(results, endpoints_alone, layout):
    assert_same_up_to_rounding(results(2).path(f"run-{layout}"), endpoints_alone, iterations=4)


@pytest.fixture(scope="module")
def sheared_alone(tiny_model, tiny_data, tmp_path_factory):
    save = tmp_path_factory.mktemp("sheared") / "run"
    tiny.run_here(tiny.sheared_argv(tiny_model("qwen3_tied"), tiny_data, save))
    return save


@pytest.mark.parametrize("layout", SHEARED_LAYOUTS)
def test_hard_concrete_gates_are_the_same_at_every_layout(results, sheared_alone, layout):
    run = results(2).path(f"run-{layout}")
    assert report(run)["kept_layers"] == report(sheared_alone)["kept_layers"]
    found, expected = read_metrics(run), read_metrics(sheared_alone)
    assert expected[0]["loss"] > 1e-2  # not the teacher against itself
    for record, wanted in zip(found, expected, strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=2e-3)
        if record["stage"] == "search":
            assert record["mask"] == pytest.approx(wanted["mask"], abs=1e-3)
            assert record["scores"] == pytest.approx(wanted["scores"], abs=1e-3)


def test_run_moves_what_it_should(whole_run, tiny_model):
    """Ensure that the comparisons above would notice a run in which nothing changes."""
    losses = [record["loss"] for record in read_metrics(whole_run)]
    assert max(losses) > 1.4 * min(losses[3:]) > 0.1
    valid = report(whole_run)["valid"]
    assert len({round(loss["loss"], 2) for loss in valid.values()}) == 4
    assert valid["recovered"]["loss"] < valid["stitched"]["loss"] - 0.5
    trained, original = tiny.read_tensors(whole_run / "hf"), tiny.read_tensors(tiny_model("qwen3_tied"))
    assert report(whole_run)["kept_layers"][0] == 0
    for name, tensor in trained.items():
        if "layers.0." in name:
            assert (tensor - original[name]).abs().max() > 5e-3, name


def test_resumed_at_the_same_layout_ends_in_the_same_bits(results):
    found = results(2)
    run, whole = found.path("run-same_layout"), found.path("run-dp2_distributed")
    tensors, expected = tiny.read_tensors(run / "hf"), tiny.read_tensors(whole / "hf")
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    for key in ("kept_layers", "scores", "valid"):
        assert report(run)[key] == report(whole)[key]
    for record, wanted in zip(read_metrics(run), read_metrics(whole), strict=True):
        assert tiny.steady(record) == tiny.steady(wanted)


@pytest.mark.parametrize("name", ["other_layouts", "other_layouts_distributed"])
def test_resumed_at_other_layouts_ends_in_the_same_model(results, whole_run, name):
    assert_same_up_to_rounding(results(2).path(f"run-{name}"), whole_run)
