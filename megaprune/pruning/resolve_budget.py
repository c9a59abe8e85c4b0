"""The budget of the kept layers from the flags that give the size of the pruned model."""

from megaprune.config.schema import Config
from megaprune.config.sizes import num_layers_to_prune
from megaprune.models import HFConfig
from megaprune.models.sizes import Size, bytes_per_weight, cached_numbers, layer_sizes, model_size
from megaprune.selection.budget import Budget
from megaprune.utils.errors import UsageError
from megaprune.weights.writer import parse_size


def budget_of(config: Config, hf_config: HFConfig) -> Budget:
    """Return the budget of the layers that stay; for methods that choose them.

    Raises:
        UsageError: the size leaves no layer to remove, or is not a size.
    """
    prune, sizes, whole = config.prune, layer_sizes(hf_config), model_size(hf_config)
    if prune.target_params is not None:
        costs = tuple(size.total for size in sizes)
        return _limited(costs, prune.target_params, whole.total, "--target-params", "parameters")
    if prune.target_active_params is not None:
        costs = tuple(size.active for size in sizes)
        return _limited(costs, prune.target_active_params, whole.active, "--target-active-params", "active parameters")
    if prune.target_memory is not None:
        return _memory_budget(config, hf_config, sizes, whole)
    num_layers = len(sizes)
    num_pruned = num_layers_to_prune(prune, num_layers)
    if num_pruned == 0:
        raise UsageError(f"--prune-ratio {prune.prune_ratio} of {num_layers} layers rounds to 0")
    return Budget.of_layers(num_layers, num_layers - num_pruned)


def _memory_budget(config: Config, hf_config: HFConfig, sizes: list[Size], whole: Size) -> Budget:
    """Return a budget of bytes: a layer costs its weights and its part of the KV cache."""
    prune, bytes_each = config.prune, bytes_per_weight(hf_config)
    length = prune.target_memory_seq_length or config.data.seq_length
    assert prune.target_memory is not None and length is not None, "the configuration is completed for the model"
    caches = [numbers * prune.target_memory_batch_size for numbers in cached_numbers(hf_config, length)]
    costs = tuple(bytes_each * (size.total + cache) for size, cache in zip(sizes, caches, strict=True))
    total = bytes_each * (whole.total + sum(caches))
    return _limited(costs, parse_size(prune.target_memory, "--target-memory"), total, "--target-memory", "bytes")


def _limited(costs: tuple[int, ...], target: int, total: int, flag: str, unit: str) -> Budget:
    if target >= total:
        raise UsageError(f"{flag} {target:,}: the model has {total:,} {unit}; give a smaller number")
    return Budget(costs, target - (total - sum(costs)), flag, unit)
