"""Maps that stand in for removed layers: their fit, and their folding into the weights."""

import pytest
import torch

from megaprune.importance.stitch import Moments, fitted, moments
from megaprune.mcore import schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.fold import fold
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.parallel import ParallelSizes
from megaprune.selection.segments import cuts
from megaprune.weights.source import HFSource
from tests.helpers import tiny

BATCHES = tiny.uneven_batches([2, 2])


def sums_of(m, rest):
    m, rest = m.double(), rest.double()
    return Moments(m.t() @ m, m.t() @ rest, rest.square().sum())


def test_a_linear_rest_is_found_and_noise_is_not_folded():
    torch.manual_seed(0)
    change, m, other = torch.randn(6, 6), torch.randn(200, 6), torch.randn(50, 6)
    found, share = fitted(sums_of(m, m @ change), sums_of(other, other @ change))
    assert torch.allclose(found, change, atol=1e-2) and share < 1e-4
    noise, held_out = torch.randn(7, 6), torch.randn(50, 6)
    found, share = fitted(sums_of(m[:7], 9 * noise), sums_of(other, held_out))
    assert not found.any() and share == 1.0
    # the error is that of the tokens themselves
    residual = (m @ change - noise[:1]).square().sum()
    assert sums_of(m, noise[:1].expand(200, 6)).error(change.double()) == pytest.approx(residual.item(), rel=1e-5)


def test_cuts_are_the_segments_that_are_gone():
    assert cuts([1, 2, 5], 8) == [(0, 0), (3, 4), (6, 7)]
    assert cuts(range(4), 4) == []


@pytest.mark.usefixtures("one_process")
def test_moments_are_those_of_the_hidden_states(tiny_model):
    folder = tiny_model("qwen3_tied")
    reference, seen, sums = tiny.load_hf(folder), [], [torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(1)]
    reference.model.layers[1].mlp.register_forward_hook(lambda module, given, output: seen.append(output))
    for batch in BATCHES:
        with torch.no_grad():
            hidden = reference(batch.tokens, output_hidden_states=True, use_cache=False).hidden_states
        m, x, target = (states.flatten(0, 1) for states in (seen.pop(), hidden[2], hidden[5]))
        scale = (batch.loss_mask.flatten() / target.square().mean(-1).sqrt())[:, None]
        for total, part in zip(sums, (m, target - x, None), strict=True):
            left = m * scale if part is not None else (target - x) * scale
            total += left.t() @ part if part is not None else (left * (target - x)).sum()
    found = moments(built(folder), BATCHES, before=1, last=4, hidden_size=64)
    for total, wanted in zip((found.gram, found.cross, found.rest), sums, strict=True):
        torch.testing.assert_close(total.float(), wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("family", ["llama2", "qwen3_moe", "deepseek_v3"])
def test_a_folded_map_is_applied_to_what_the_mlp_adds(tiny_model, family):
    model = built(tiny_model(family))
    torch.manual_seed(0)
    maps = {layer: 0.1 * torch.randn(64, 64) for layer in (1, 3)}

    def mapped(number):
        def hook(module, given, output):
            return output[0] + output[0] @ maps[number], output[1]

        return hook

    hooks = [layer.mlp.register_forward_hook(mapped(number)) for number, layer in model.layers() if number in maps]
    wanted = logits_of(model)
    for hook in hooks:
        hook.remove()
    before = logits_of(model)
    fold(model, maps)
    torch.testing.assert_close(logits_of(model), wanted, rtol=1e-3, atol=1e-3)
    assert (before - wanted).abs().max() > 0.1


def built(folder):
    """Return the model in Megatron-Core, on one process."""
    source = HFSource(folder)
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))
    import_weights(model, source)
    return model


def logits_of(model):
    return torch.cat(schedule.forward(model, BATCHES, lambda logits, _: logits.transpose(0, 1).clone()))
