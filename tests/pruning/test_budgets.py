"""The sizes that a pruned model can be given: parameters, active parameters, memory."""

import pytest
import torch

from megaprune.config.schema import Config
from megaprune.models.sizes import layer_sizes, model_size
from megaprune.pruning.resolve_budget import budget_of
from megaprune.utils.errors import MegapruneError, UsageError
from tests.helpers import real_configs, tiny


def budget(hf_config, **size):
    asked = {"hf_model": "m", "save": "s", "train_iters": 0, "train_data": ["d"], "method": "shortgpt"}
    return budget_of(Config.from_mapping(asked | size).with_window(4096), hf_config)


def test_active_parameters_count_the_chosen_experts_alone():
    sizes, whole = layer_sizes(real_configs.DEEPSEEK_R1), model_size(real_configs.DEEPSEEK_R1)
    found = budget(real_configs.DEEPSEEK_R1, target_active_params=30_000_000_000)
    assert found.costs == tuple(size.active for size in sizes)
    assert whole.active - sum(found.costs) + found.limit == 30_000_000_000
    # a token passes through 8 of 256 experts and the shared one
    assert 12 * sizes[60].active < sizes[60].total


@pytest.mark.parametrize(
    ("config", "cached"), [(real_configs.DEEPSEEK_R1, 512 + 64), (real_configs.QWEN3_32B, 2 * 8 * 128)]
)
def test_memory_counts_weights_and_the_cache_of_each_layer(config, cached):
    size = dict(target_memory="40GB", target_memory_batch_size=3, target_memory_seq_length=1000)
    found = budget(config, **size)
    assert found.costs == tuple(2 * (layer.total + 3 * 1000 * cached) for layer in layer_sizes(config))
    outside = 2 * model_size(config, []).total
    assert found.limit == 40_000_000_000 - outside


def test_the_cache_has_windows_of_the_run_by_default():
    short, long = (budget(real_configs.QWEN3_32B, target_memory="40GB", seq_length=n) for n in (100, 1100))
    assert long.costs[0] - short.costs[0] == 2 * 1000 * 2 * 8 * 128


def test_a_layer_with_a_window_keeps_no_more_than_the_window():
    windows = {"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 2}
    found = budget(real_configs.QWEN3_32B | windows, target_memory="40GB", target_memory_seq_length=1000)
    full, slides = 2 * 1000 * 2 * 8 * 128, 2 * 300 * 2 * 8 * 128
    assert found.costs[1] - found.costs[2] == full - slides and found.costs[2] == found.costs[63]


def test_the_served_model_fits_and_no_removed_layer_would(tiny_model, tiny_data, tmp_path):
    """The memory is measured on the exported model: its tensors, and what transformers' cache holds."""
    model, batch, length = tiny_model("qwen3_tied"), 2, 97
    limit = 1_200_000
    argv = tiny.select_argv(model, tiny_data, tmp_path / "run", "shortgpt")
    at = argv.index("--num-layers-to-prune")
    size = ("--target-memory", "1.2MB", "--target-memory-batch-size", str(batch), "--target-memory-seq-length", "97")
    tiny.run_here([*argv[:at], *argv[at + 2 :], *size])
    pruned = tiny.load_hf(tmp_path / "run" / "hf")
    with torch.no_grad():
        cache = pruned(tiny.random_tokens(batch, length), use_cache=True).past_key_values
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    weights = sum(x.nbytes for x in tiny.read_tensors(tmp_path / "run" / "hf").values())
    layers = pruned.config.num_hidden_layers
    each = (held + sum(p.nbytes for p in pruned.model.layers.parameters())) / layers
    assert held + weights <= limit < held + weights + each


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"target_memory": "2TB"}, r"--target-memory 2,000,000,000,000: the model has 1,3\d\d,.* bytes"),
        ({"target_memory": "much"}, "--target-memory 'much' is not a size such as"),
        ({"target_active_params": 38_000_000_000}, "--target-active-params 38,000,000,000: the model has 37,"),
        ({"target_active_params": 10**9, "target_params": 10**9}, "give exactly one of"),
        ({"num_layers_to_prune": 3, "target_memory_batch_size": 4}, "--target-memory-batch-size needs --target-memory"),
        ({"method": "clp", "target_memory": "1TB"}, "--method clp finds a segment .* not --target-memory"),
    ],
)
def test_wrong_sizes_are_refused(size, message):
    with pytest.raises(UsageError, match=message):
        budget(real_configs.DEEPSEEK_R1, **size)


def test_a_budget_below_the_protected_layers_names_its_flag():
    with pytest.raises(UsageError, match=r"--target-active-params: leaves .* active parameters for layers"):
        budget(real_configs.DEEPSEEK_R1, target_active_params=2_000_000_000).check(frozenset({0, 60}))


def test_a_dtype_of_unknown_size_is_refused():
    with pytest.raises(MegapruneError, match="config.json: the size of dtype 'int3' is not known"):
        budget(real_configs.QWEN3_32B | {"dtype": "int3"}, target_memory="40GB")
