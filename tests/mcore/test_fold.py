"""A map that is folded into a layer's weights is applied to the output of its MLP."""

import pytest
import torch

from megaprune.mcore import fold, schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.mark.parametrize("family", ["qwen3_tied", "llama_biased", "deepseek_v3", "gpt_oss"])
def test_the_output_of_the_mlp_is_mapped(tiny_model, family):
    source = HFSource(tiny_model(family))
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))
    import_weights(model, source)
    torch.manual_seed(0)
    with torch.no_grad():  # biases of new models are 0
        for name, parameter in model.named_parameters():
            if name.endswith("linear_fc2.bias"):
                parameter.normal_()
    size, batch = model.config.hidden_size, tiny.make_batch(tiny.random_tokens())
    change = 0.3 * torch.randn(size, size)

    def output():
        with fold.watched_mlp(model, 1) as seen:
            schedule.forward(model, [batch], lambda logits, tokens: None)
        return seen[0]

    before = output()
    with fold.folded(model, {1: change}):
        torch.testing.assert_close(output(), before + before @ change, atol=1e-4, rtol=1e-4)
    assert torch.equal(output(), before)
