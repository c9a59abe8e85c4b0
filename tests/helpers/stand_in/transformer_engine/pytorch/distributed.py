from contextlib import nullcontext
from typing import Any

from torch.utils.checkpoint import checkpoint as recompute


def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Any:
    """Return the block in which FP8 state is kept for a recomputation."""
    return nullcontext()


class CudaRNGStatesTracker:
    """Tracker of generators; the base of a class of the core."""


def checkpoint(function: Any, *args: Any, distribute_saved_activations: bool, **given: Any) -> Any:
    """Recompute a function's activations in the backward pass."""
    given = {name: value for name, value in given.items() if name not in ("get_rng_state_tracker", "tp_group")}
    return recompute(function, *args, use_reentrant=False, **given)
