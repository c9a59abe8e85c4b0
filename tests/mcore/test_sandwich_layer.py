"""openPangu's layer against its formula, gated or not, and in a checkpoint's names."""

import pytest
import torch

from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models import family_of
from tests.helpers.real_configs import OPENPANGU_ULTRA

CONFIG = OPENPANGU_ULTRA | dict(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=2,
    num_hidden_layers=2,
    vocab_size=100,
    attention_q_lora_dim=16,
    attention_kv_lora_dim=8,
    attention_qk_dim=8,
    attention_qk_rope_dim=4,
    attention_v_dim=8,
    moe_intermediate_size=16,
    num_routed_experts=4,
    num_experts_per_tok=2,
    num_dense_layers=1,
)


@pytest.fixture(scope="module", params=["plain", "gated"])
def model(request):
    parallel.initialize(ParallelSizes())
    gate = LayerGate() if request.param == "gated" else None
    built = build_model(family_of(CONFIG).architecture(CONFIG), [2], EngineOptions(ParallelSizes()), gate)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    yield built.eval()
    parallel.finish()


@torch.no_grad()
def test_layers_follow_the_formula(model):
    hidden = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(1))
    for _, layer in model.layers():
        attended = hidden + layer.post_attention_layernorm(
            layer.self_attention(layer.input_layernorm(hidden), attention_mask=None)[0]
        )
        expected = attended + layer.post_mlp_layernorm(layer.mlp(layer.pre_mlp_layernorm(attended))[0])
        found = layer(hidden_states=hidden.clone(), attention_mask=None)[0]
        torch.testing.assert_close(found, expected)
        assert (found - hidden).abs().max() > 0.1
        hidden = expected


def test_the_norms_are_in_checkpoints(model):
    keys = model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).keys()
    for name in ("post_attention_layernorm", "post_mlp_layernorm"):
        assert sum(f".{name}.weight" in key for key in keys) == 2
