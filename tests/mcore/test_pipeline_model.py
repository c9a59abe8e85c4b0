"""The model on a rank: what it holds is the same in one chunk and in two."""

import pytest
import torch

from megaprune.mcore.builder import EngineOptions, build_model, train_only
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.layers.lora import LoRAOptions, adapted_layers, add_adapters
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.weights.source import HFSource

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def source(tiny_model):
    return HFSource(tiny_model("qwen3"))


def build(source, kept=None):
    arch = source.family.architecture(source.config)
    arch = arch if kept is None else arch.pruned(kept)
    return build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))


@pytest.fixture
def chunked(source):
    """A model of five layers in chunks of two and three, each of them with an embedding and an output layer."""
    first, second = build(source, [0, 1]), build(source, [0, 1, 2])
    for _, layer in second.layers():
        layer.layer_number += 2
    return PipelineModel([*first.chunks, *second.chunks])


def test_one_chunk_is_seen_as_it_is(source):
    model = build(source)
    (chunk,) = model.chunks
    assert list(model.named_parameters()) == list(chunk.named_parameters())
    assert dict(model.named_weights()).keys() == dict(chunk.named_parameters()).keys()
    assert [number for number, _ in model.layers()] == list(range(len(chunk.decoder.layers)))
    metadata = {"non_homogeneous_layers": True}
    assert model.sharded_state_dict(metadata).keys() == chunk.sharded_state_dict(metadata=metadata).keys()


def test_layers_of_all_chunks_have_their_own_numbers_and_names(source, chunked):
    assert [number for number, _ in chunked.layers()] == [0, 1, 2, 3, 4]
    whole = {name for name, _ in build(source, range(5)).named_weights()}
    assert {name for name, _ in chunked.named_weights()} == whole
    import_weights(chunked, source, range(5))
    expected = build(source, range(5))
    import_weights(expected, source, range(5))
    found = dict(chunked.named_weights())
    assert all(torch.equal(found[name], weight) for name, weight in expected.named_weights())


def test_what_is_done_to_the_model_is_done_to_every_chunk(chunked):
    assert chunked.training
    assert not chunked.eval().training and not any(chunk.training for chunk in chunked.chunks)
    train_only(chunked, [1, 4])
    trained = {name.split(".")[2] for name, parameter in chunked.named_parameters() if parameter.requires_grad}
    assert trained == {"1", "4"}
    add_adapters(chunked, LoRAOptions(2, 4.0, ("linear_proj",)))
    assert list(adapted_layers(chunked)) == [f"decoder.layers.{layer}.self_attention.linear_proj" for layer in range(5)]
    names = {name for name, parameter in chunked.named_parameters() if parameter.requires_grad}
    assert len(names) == 10 and not names & {name for name, _ in chunked.named_weights()}


def test_layers_are_watched_by_their_number(source, chunked):
    import_weights(chunked, source, range(5))
    hidden = torch.randn(4, 1, source.config["hidden_size"])
    seen = []
    with chunked.watched_layers(lambda number, entering, leaving: seen.append((number, entering, leaving))):
        for _, layer in chunked.layers():
            hidden = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=None)[0]
    assert [number for number, _, _ in seen] == [0, 1, 2, 3, 4]
    assert seen[-1][2] is hidden
    for (_, _, leaving), (_, entering, _) in zip(seen, seen[1:], strict=False):
        assert torch.equal(leaving, entering) and leaving.shape == hidden.shape
    assert not any(layer._forward_hooks for _, layer in chunked.layers())
