"""The formula for operations against a count of the operations of the model itself."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megaprune.mcore import schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models.flops import layer_flops, output_flops, step_flops
from megaprune.models.shards import padded_vocab_size
from megaprune.weights.source import HFSource
from tests.helpers import pangu, tiny

pytestmark = pytest.mark.usefixtures("one_process")
LENGTH, WINDOWS = 96, 2


def counted(run):
    """Return the operations of matrix products, and of attention, of a call."""
    # without fused kernels, whose operations are not counted on the CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "bmm" in str(op))
    return sum(counts.values()) - attention, attention


@pytest.mark.parametrize("family", ["qwen3_tied", "qwen2", "qwen3_moe", "deepseek_v3", "pangu_ultra_moe"])
@pytest.mark.parametrize("kept", [None, [0, 2, 3]], ids=["whole", "pruned"])
def test_formula_equals_the_count(tiny_model, tmp_path, family, kept):
    folder = tiny_model(family) if family != "pangu_ultra_moe" else pangu.make_checkpoint(tmp_path / "model")
    source = HFSource(folder)
    whole = source.family.architecture(source.config)
    arch = whole if kept is None else whole.pruned(kept)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))
    import_weights(model, source, kept)
    layers = layer_flops(source.config, LENGTH)
    chosen = range(len(layers)) if kept is None else kept
    # the core pads the vocabulary
    padding = 2 * LENGTH * (padded_vocab_size(arch.vocab_size, 1) - arch.vocab_size) * arch.transformer["hidden_size"]
    output = output_flops(source.config, LENGTH)
    batch = tiny.make_batch(tiny.random_tokens(WINDOWS, LENGTH + 1))

    weights, attention = counted(lambda: schedule.forward(model, [batch], lambda logits, _: None))
    expected = sum(layers[layer].weights for layer in chosen) + output.total
    assert weights == WINDOWS * (expected + padding)
    # torch counts the whole score matrix of causal attention
    whole_scores = WINDOWS * 2 * sum(layers[layer].attention for layer in chosen)
    assert attention == whole_scores

    weights, attention = counted(
        lambda: schedule.forward_backward(model, [batch], lambda logits, _: logits.float().square().sum())
    )
    assert weights == 3 * WINDOWS * (expected + padding)
    assert attention == 3 * whole_scores
    step = step_flops(layers, output, chosen, chosen, chosen, trains_output=True)
    assert step == 3 * (expected + sum(layers[layer].attention for layer in chosen))


def test_what_is_frozen_costs_less(tiny_model):
    config = HFSource(tiny_model("qwen3_tied")).config
    layers, output = layer_flops(config, LENGTH), output_flops(config, LENGTH)
    every = range(len(layers))
    trained = step_flops(layers, output, every, every, every, trains_output=True)
    adapted = step_flops(layers, output, every, every, [], trains_output=False)
    assert trained - adapted == sum(flops.weights for flops in layers) + output.total
    masked = step_flops(layers, output, every, every[1:], [], trains_output=False)
    assert adapted - masked == layers[0].weights + 2 * layers[0].attention
