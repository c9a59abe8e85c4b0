"""Masks that are nearly equal by KL are compared with their stitch, before one of them is chosen."""

import json

import pytest
import torch

from megaprune.mcore.fold import folded
from megaprune.pruning import stitched_choice
from megaprune.selection.registry import Choice, register, registrations_undone
from tests.helpers import tiny

# the layers that stay, and a KL that is not measured
MASKS = {"first": ([0, 2, 4, 5, 6], 1.0), "second": ([0, 1, 2, 5, 6], 1.05), "far": ([0, 1, 2, 3, 6], 1.2)}


@pytest.fixture
def run(tiny_model, tiny_data, tmp_path):
    """Return a function that completes a run with a method's candidates, and returns its report."""

    def completed(name, *flags, chosen="first"):
        with registrations_undone():

            @register("given", calibrated=True, description="masks of the test")
            def given(evaluator, budget, protected):
                candidates = [
                    {"name": name, "kept_layers": kept, "kl": kl, "tokens": 0, "chosen": name == chosen}
                    for name, (kept, kl) in MASKS.items()
                ]
                return Choice(MASKS[chosen][0], None, candidates)

            tiny.run_here(tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, "given", *flags))
        return json.loads((tmp_path / name / "report.json").read_text())

    return completed


def gone(name):
    return ",".join(str(layer) for layer in range(7) if layer not in MASKS[name][0])


def test_the_lowest_loss_with_the_stitch_goes_on(run, tiny_model, tiny_data, tmp_path):
    def named(name):
        tiny.run_here(tiny.stitched_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / f"named-{name}", gone(name)))
        return tmp_path / f"named-{name}"

    report = run("whole", "--stitch", "fold")
    losses = {candidate["name"]: candidate.get("stitched_loss") for candidate in report["candidates"]}
    assert losses["far"] is None and losses["first"] != losses["second"]
    best = min(("first", "second"), key=losses.get)
    assert report["kept_layers"] == MASKS[best][0]
    assert [candidate["name"] for candidate in report["candidates"] if candidate["chosen"]] == [best]
    # the model was compared with its maps, and is pruned with its own weights: as if the layers had been named
    tensors, expected = (tiny.read_tensors(path / "hf") for path in (tmp_path / "whole", named(best)))
    assert tensors.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
    assert not list((tmp_path / "whole").glob("stitch-parts*"))
    windows, length = 4, tiny.SEQ_LENGTH
    cuts = {(1, 1), (3, 3), (3, 4)}
    assert report["stages"]["importance"]["tokens"] == len(cuts) * windows * length + 2 * -(-5 * windows * length // 7)
    assert report["stages"]["stitch"]["tokens"] == 0


def test_the_choice_follows_the_losses(run, monkeypatch):
    measured = iter([3.0, 2.0, 2.0, 3.0])

    class Evaluator:
        def losses(self, kept_sets, loss):
            return [next(measured)]

        def tokens_of(self, layers):
            return 0

    def choose(run, model, evaluator):
        return original(run, model, Evaluator)

    original = stitched_choice.choose_stitched
    monkeypatch.setattr("megaprune.pruning.select.choose_stitched", choose)
    assert run("second", "--stitch", "fold")["kept_layers"] == MASKS["second"][0]
    assert run("first", "--stitch", "fold")["kept_layers"] == MASKS["first"][0]


def test_without_a_stitch_nothing_is_compared(run):
    report = run("plain", "--stitch", "none")
    assert report["kept_layers"] == MASKS["first"][0]
    assert not any("stitched_loss" in candidate for candidate in report["candidates"])


def test_weights_have_their_own_bits_after_a_comparison():
    model = torch.nn.Module()
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for layer in model.decoder.layers:
        layer.mlp = torch.nn.Module()
        layer.mlp.linear_fc2 = torch.nn.Linear(6, 4, bias=False, dtype=torch.bfloat16)
    weights = [layer.mlp.linear_fc2.weight for layer in model.decoder.layers]
    before = [weight.detach().clone() for weight in weights]
    with pytest.raises(KeyboardInterrupt), folded(model, {1: torch.randn(4, 4)}):
        assert torch.equal(weights[0], before[0]) and not torch.equal(weights[1], before[1])
        raise KeyboardInterrupt
    assert all(map(torch.equal, weights, before))
