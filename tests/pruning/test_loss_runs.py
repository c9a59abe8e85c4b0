"""Runs with all parts of the loss: metrics, exported MTP layers, and a run that was stopped in between."""

import json

import pytest
import torch

from megaprune.pruning import train
from megaprune.report.metrics import read_metrics
from megaprune.utils.errors import RunStopped, UsageError
from megaprune.weights.source import HFSource
from tests.helpers import mtp, tiny

FLAGS = ("--train-iters", "6", "--search-iters", "3", "--num-layers-to-prune", "2", "--kd-loss-alpha", "0.5")
MTP = ("--mtp-loss-scaling-factor", "0.3")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mtp.make_model(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="module")
def argv(model, tiny_data):
    return lambda save: tiny.prune_argv(model, tiny_data, save, *FLAGS, *MTP, "--hidden-loss-weight", "0.5")


@pytest.fixture(scope="module")
def whole(argv, tmp_path_factory):
    save = tmp_path_factory.mktemp("whole") / "run"
    tiny.run_here(argv(save))
    return save


def test_every_part_is_logged_and_the_loss_is_their_sum(whole):
    records = read_metrics(whole)
    for record in records:
        loss = 0.5 * record["kd_loss"] + 0.5 * record["lm_loss"] + 0.3 * record["mtp_1_loss"]
        if record["stage"] == "recovery":
            loss += 0.5 * record["hidden_loss"]
        assert record["loss"] == pytest.approx(loss, rel=1e-6)
        assert ("hidden_loss" in record) == (record["stage"] == "recovery")
    assert records[-1]["mtp_1_loss"] < records[0]["mtp_1_loss"]


def test_the_exported_mtp_layer_is_the_trained_one(whole, model):
    found, source = HFSource(whole / "hf"), HFSource(model)
    found.check_tensors()
    assert found.mtp_layers == [3] and found.config["num_nextn_predict_layers"] == 1
    for name in source.mtp_own():
        tensor, before = found.read(name.replace(".5.", ".3.", 1)), source.read(name)
        assert tensor.shape == before.shape and tensor.dtype == before.dtype
        assert torch.equal(tensor, before) == name.endswith("e_score_correction_bias"), name
    assert torch.equal(found.read("model.layers.3.embed_tokens.weight"), found.read("model.embed_tokens.weight"))


@pytest.mark.parametrize("iterations", [2, 5])
def test_a_stopped_run_ends_with_the_same_bits(argv, whole, tmp_path, iterations):
    save = tmp_path / "run"
    with pytest.raises(RunStopped):
        tiny.run_here(argv(save), tiny.stop_after(iterations))
    tiny.run_here(argv(save))
    tensors, expected = tiny.read_tensors(save / "hf"), tiny.read_tensors(whole / "hf")
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    for record, wanted in zip(read_metrics(save), read_metrics(whole), strict=True):
        assert tiny.steady(record) == tiny.steady(wanted)


def test_a_model_without_mtp_layers_is_refused(tiny_model, tiny_data, tmp_path):
    with pytest.raises(UsageError, match="--mtp-loss-scaling-factor: the model has no multi-token-prediction layers"):
        tiny.run_here(tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", *MTP))
    assert not (tmp_path / "run").exists()


def test_rounds_train_the_mtp_layer_and_compare_with_the_layers_of_the_original_model(
    model, tiny_data, tmp_path, monkeypatch
):
    compared = []

    class Recorded(train.WithHiddenStates):
        def __init__(self, inner, teacher, student, layers, weight):
            compared.append(list(layers.values()))
            super().__init__(inner, teacher, student, layers, weight)

    monkeypatch.setattr(train, "WithHiddenStates", Recorded)
    flags = ("--rounds", "2", "--protect-layers", "none", "--hidden-loss-weight", "0.5")
    argv = tiny.select_argv(model, tiny_data, tmp_path / "run", "random", *flags, *MTP)
    tiny.run_here([*argv, "--train-iters", "2"])
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert compared == [each["kept_layers"] for each in report["rounds"]] and compared[1] == report["kept_layers"]
    assert all(record["mtp_1_loss"] > 0 and record["hidden_loss"] > 0 for record in read_metrics(tmp_path / "run"))
    found, source = HFSource(tmp_path / "run" / "hf"), HFSource(model)
    assert not torch.equal(found.read("model.layers.3.eh_proj.weight"), source.read("model.layers.5.eh_proj.weight"))
