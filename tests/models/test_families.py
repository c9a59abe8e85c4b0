"""Every family: a model without two of its layers equals the masked model, loads in transformers and generates."""

import json

import pytest
import torch

import megaprune
from megaprune.mcore import schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_process")]
# The first layer is one of them where it is not the only one of its kind.
FAMILIES = {name: (0, 2) if name in tiny.FAMILIES else (1, 3) for name in (*tiny.FAMILIES, *tiny.MOE_FAMILIES)}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request, tiny_model, tmp_path_factory):
    """The source, the numbers of removed layers, and the pruned folder."""
    gone = FAMILIES[request.param]
    source, out = tiny_model(request.param), tmp_path_factory.mktemp("families") / request.param
    megaprune.remove_layers(source, gone, out)
    return source, gone, out


def test_tensors_that_stay_are_their_source(models):
    folder, gone, out = models
    source, found = HFSource(folder), tiny.read_tensors(out)
    kept = [layer for layer in range(source.num_layers) if layer not in gone]
    expected = {}
    for name, tensor in tiny.read_tensors(folder).items():
        before, layers, after = name.partition("layers.")
        number, dot, rest = after.partition(".")
        if not layers or "vision" in before:
            expected[name] = tensor
        elif int(number) in kept:
            expected[f"{before}{layers}{kept.index(int(number))}{dot}{rest}"] = tensor
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
def test_the_pruned_model_is_the_masked_one(models):
    folder, gone, out = models
    source, gate = HFSource(folder), LayerGate()
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()), gate)
    import_weights(model, source)
    gate.set(torch.tensor([float(layer not in gone) for layer in range(arch.num_layers)]))
    tokens = tiny.random_tokens(seq_length=65)
    (logits,) = schedule.forward(model, [tiny.make_batch(tokens)], lambda logits, _: logits)
    expected = tiny.hf_logits(out, tokens[:, :-1])
    torch.testing.assert_close(logits.transpose(0, 1)[..., : arch.vocab_size], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_it_generates_with_its_cache_as_without(models):
    model = tiny.load_hf(models[2])  # fails unless every weight fits
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    tokens = tiny.random_tokens(batch=1, seq_length=45)  # beyond the windows
    settings = dict(max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(tokens))
    found, expected = (model.generate(tokens, use_cache=cache, **settings) for cache in (True, False))
    assert found.shape[1] == 49 and torch.equal(found, expected)


def test_a_key_that_is_not_known_is_refused(models):
    source = HFSource(models[0])
    config = json.loads((models[0] / "config.json").read_text())
    inner = config.get("text_config", config)
    for value in (True, 2, "linear", [1]):
        inner["attention_variant"] = value
        with pytest.raises(megaprune.MegapruneError, match=r"'attention_variant' in config\.json is .*not known"):
            source.family.architecture(config)
    for value in (None, False, "", []):
        inner["attention_variant"] = value
        source.family.architecture(config)
    inner["attention_variant"], inner["unsloth_fixed"], inner["transformers_version"] = None, True, "5.99"
    assert source.family.architecture(config) == source.family.architecture(source.config)
