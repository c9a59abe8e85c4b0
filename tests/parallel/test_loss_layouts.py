"""Losses on hidden states and of MTP layers are the same at every parallel layout, and so are the trained weights."""

import pytest
import torch

from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.parallel import loss_cases
from tests.parallel.layouts import FULL_TRAINING, HIDDEN_LAYOUTS, MTP_LAYOUTS


@pytest.fixture(scope="module")
def hidden_alone(source, tmp_path_factory):
    """Steps with a loss on hidden states on one process."""
    out = tmp_path_factory.mktemp("hidden") / "step"
    loss_cases.hidden_states(source("qwen3_tied"), {}, [[7], [4]], None, out)
    return torch.load(f"{out}.0")


@pytest.fixture(scope="module")
def mtp_alone(mtp_model, tmp_path_factory):
    """Steps with the loss of an MTP layer on one process."""
    out = tmp_path_factory.mktemp("mtp") / "step"
    loss_cases.multi_token(mtp_model, {}, [[5], [3]], None, out)
    return out


def assert_same_steps(found, wanted, parts):
    """Check the steps of all ranks against those of one process."""
    assert all(other == found[0] for other in found[1:])
    for (loss, norm, means), (wanted_loss, wanted_norm, wanted_means) in zip(found[0], wanted, strict=True):
        assert wanted_means.keys() == parts and min(wanted_means.values()) > 0.01
        assert means == {name: pytest.approx(mean, rel=1e-4) for name, mean in wanted_means.items()}
        assert loss == pytest.approx(wanted_loss, rel=1e-4) and norm == pytest.approx(wanted_norm, rel=1e-3)


@pytest.fixture(scope="module")
def trained_alone(tiny_model, tmp_path_factory):
    """Return a function that gives the steps of a family on one process."""
    made = {}

    def get(family):
        if family not in made:
            out = tmp_path_factory.mktemp("trained") / "step"
            loss_cases.full_training(tiny_model(family), {}, out)
            made[family] = torch.load(f"{out}.0")
        return made[family]

    return get


@pytest.mark.parametrize("name", FULL_TRAINING)
def test_every_weight_has_the_same_gradient(results, trained_alone, name):
    out = results(2).path(f"full_training-{name}")
    wanted = trained_alone(FULL_TRAINING[name][0])
    for (loss, norm, _), (wanted_loss, wanted_norm, _) in zip(torch.load(f"{out}.0"), wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5) and norm == pytest.approx(wanted_norm, rel=1e-5)


@pytest.mark.parametrize("layout", HIDDEN_LAYOUTS)
def test_loss_on_hidden_states(results, hidden_alone, layout):
    processes = HIDDEN_LAYOUTS[layout][0]
    out = results(processes).path(f"hidden_states-{layout}")
    found = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    assert_same_steps(found, hidden_alone, {"kd_loss", "lm_loss", "hidden_loss"})


@pytest.mark.parametrize("layout", MTP_LAYOUTS)
def test_loss_of_mtp_layers(results, mtp_alone, mtp_model, layout):
    processes = MTP_LAYOUTS[layout][0]
    out = results(processes).path(f"multi_token-{layout}")
    found = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    assert_same_steps(found, torch.load(f"{mtp_alone}.0"), {"kd_loss", "lm_loss", "mtp_1_loss", "hidden_loss"})
    tensors, wanted = (tiny.read_tensors(path.with_name(f"{path.name}-hf")) for path in (out, mtp_alone))
    source = tiny.read_tensors(mtp_model)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(tensors[name], tensor, atol=5e-4, rtol=1e-3, msg=name)
        if name.startswith("model.layers.3.") and name.endswith(("norm.weight", "proj.weight")):
            assert not torch.equal(tensor, source[name.replace(".3.", ".5.", 1)]), f"{name} was not trained"
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])


def test_a_run_that_goes_on_at_other_layouts(results, mtp_model, tiny_data, tmp_path):
    tiny.run_here(loss_cases.argv(mtp_model, tiny_data, tmp_path / "run"))
    found = results(2).path("losses")
    for record, wanted in zip(read_metrics(found), read_metrics(tmp_path / "run"), strict=True):
        parts = {name for name in wanted if name.endswith("loss")}
        assert len(parts) == (5 if wanted["stage"] == "recovery" else 4)
        for name in parts:
            assert record[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), (name, record["iteration"])
    tensors, expected = tiny.read_tensors(found / "hf"), tiny.read_tensors(tmp_path / "run" / "hf")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
