"""Pruning edits config.json where the layers show, and nowhere else."""

import copy

import pytest

from megaprune.models import family_of
from tests.helpers.real_configs import DENSE, MOE, QWEN2_5_14B, QWEN3_30B_A3B


def prune(config, kept):
    """The pruned config, and that the source's own was left alone."""
    before = copy.deepcopy(config)
    pruned = family_of(config).prune_config(config, kept)
    assert config == before
    return pruned


@pytest.mark.parametrize("name", DENSE)
def test_dense(name):
    config = DENSE[name]
    kept = [layer for layer in range(config["num_hidden_layers"]) if layer % 3]
    assert prune(config, kept) == config | {"num_hidden_layers": len(kept)}
    assert list(prune(config, kept)) == list(config)  # the order of keys too


def test_layer_types_follow_their_layers():
    types = ["full_attention", "other_attention"] * 24
    pruned = prune(QWEN2_5_14B | {"layer_types": types}, [0, 3, 4, 47])
    assert pruned["layer_types"] == [types[layer] for layer in (0, 3, 4, 47)]
    assert "layer_types" not in prune(QWEN2_5_14B, [0, 3])


def test_the_pruned_config_has_the_pruned_architecture():
    for config in (DENSE | MOE).values():
        family, kept = family_of(config), [0, 1, 5, config["num_hidden_layers"] - 1]
        arch = family.architecture(config)
        assert family.architecture(prune(config, kept)) == arch.pruned(kept)
        assert arch.num_layers == config["num_hidden_layers"]


def test_dense_prefix_and_multi_token_prediction():
    deepseek = prune(MOE["deepseek-r1"], [0, 2, 3, 60])
    assert (deepseek["num_hidden_layers"], deepseek["first_k_dense_replace"]) == (4, 2)
    assert prune(MOE["deepseek-r1"], [3, 4])["first_k_dense_replace"] == 0
    pangu = prune(MOE["openpangu-ultra"], [0, 2, 3, 60])
    assert pangu["num_dense_layers"] == pangu["first_k_dense_replace"] == 2
    assert pangu["num_mtp_layers"] == pangu["num_nextn_predict_layers"]


def test_deepseeks_routing_is_written_for_vllm():
    written = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    config = {name: value for name, value in MOE["deepseek-r1"].items() if name not in written}
    pruned = prune(config, [0, 3, 4])
    assert {name: pruned[name] for name in written} == written
    assert family_of(pruned).architecture(pruned) == family_of(config).architecture(config).pruned([0, 3, 4])


def test_dense_layers_between_experts_are_listed_anew():
    config = QWEN3_30B_A3B | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}
    # 0 and 2 are dense by the step, 3 by the list
    pruned = prune(config, [0, 1, 3, 5])
    assert (pruned["decoder_sparse_step"], pruned["mlp_only_layers"]) == (1, [0, 2])
    assert family_of(pruned).architecture(pruned).transformer["moe_layer_freq"] == [0, 1, 0, 1]
