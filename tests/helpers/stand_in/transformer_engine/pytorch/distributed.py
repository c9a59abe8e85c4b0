from typing import Any

from torch.utils.checkpoint import checkpoint as recompute


class CudaRNGStatesTracker:
    """Tracker of generators; the base of a class of the core."""


def checkpoint(function: Any, *args: Any, distribute_saved_activations: bool, **given: Any) -> Any:
    """Recompute a function's activations in the backward pass."""
    given = {name: value for name, value in given.items() if name not in ("get_rng_state_tracker", "tp_group")}
    return recompute(function, *args, use_reentrant=False, **given)
