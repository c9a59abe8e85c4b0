"""Multi-token-prediction layers follow the kept layers, or are removed; names, counts and copies stay consistent."""

import pytest
import torch

from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers.checkpoints import random_tensors, write_folder

DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 5,
    "num_attention_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 2,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "self_attn.o_proj.weight", "shared_head.norm.weight")
COPIES = ("embed_tokens.weight", "shared_head.head.weight")


@pytest.fixture
def folder(tmp_path):
    tensors = random_tensors(DEEPSEEK)
    tensors |= {f"model.layers.5.{name}": torch.full((4, 4), float(i)) for i, name in enumerate(OWN + COPIES)}
    write_folder(tmp_path / "source", DEEPSEEK, tensors, num_files=2)
    return tmp_path / "source"


@pytest.mark.parametrize("keep", [True, False])
def test_mtp_is_carried_or_dropped(folder, tmp_path, keep):
    source, out = HFSource(folder), tmp_path / "out"
    source.check_tensors()
    assert source.mtp_layers == [5]
    out.mkdir()
    write_pruned_weights(source, [0, 2, 4], out, 10**9, keep)
    write_pruned_config(source, [0, 2, 4], out, keep)
    result = HFSource(out)
    result.check_tensors()
    assert result.config["num_hidden_layers"] == 3
    assert result.config["first_k_dense_replace"] == 1
    assert result.config["num_nextn_predict_layers"] == int(keep)
    assert result.mtp_layers == ([3] if keep else [])
    assert not any(name.startswith(("model.layers.4", "model.layers.5")) for name in result.names)
    for name in OWN + COPIES if keep else ():
        assert torch.equal(result.read(f"model.layers.3.{name}"), source.read(f"model.layers.5.{name}"))


def test_copies_are_told_from_what_is_the_layers_own(folder):
    source = HFSource(folder)
    assert source.mtp_copies("model.embed_tokens.weight") == ["model.layers.5.embed_tokens.weight"]
    assert source.mtp_copies("lm_head.weight") == ["model.layers.5.shared_head.head.weight"]
    assert source.mtp_copies("model.norm.weight") == []
    assert sorted(source.mtp_own()) == sorted(f"model.layers.5.{name}" for name in OWN)
