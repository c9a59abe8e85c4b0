"""The interface of every learned search, and the checks that all ways of selecting layers share."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.utils.errors import MegapruneError, UsageError


class Selector(Protocol):
    """Learns which layers stay from the gradient that the loss sends to a mask over the layers.

    A training step is `mask(step)`, forward and backward through the model with that mask, then
    `update(mask_grad, step)`. Every rank holds the same selector and feeds it the same gradient, so all
    ranks hold the same mask without talking. Layers and steps count from 0.
    """

    num_layers: int
    budget: Budget

    def mask(self, step: int) -> Tensor:
        """[num_layers] fp32 on the CPU, detached; 1 keeps a layer, 0 bypasses it."""

    def update(self, mask_grad: Tensor, step: int) -> None:
        """Move the scores by `mask_grad`, [num_layers], the loss's gradient at `mask(step)`."""

    @property
    def scores(self) -> Tensor:
        """[num_layers] fp32 on the CPU, detached; higher is kept."""

    def temperature(self, step: int) -> float:
        """The relaxation's temperature at this step, without unit."""

    def kept_layers(self) -> list[int]:
        """The search's answer: the layers that stay, ascending, within the budget."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data only; enough to continue the same trajectory bit for bit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises MegapruneError if the state is that of a search with other settings."""


def check_gradient(mask_grad: Tensor, step: int) -> None:
    """Raises MegapruneError unless the gradient of a search's step is finite."""
    if not mask_grad.isfinite().all():
        raise MegapruneError(
            f"the mask's gradient at search step {step} is not finite: the loss has diverged, lower --lr"
        )


def check_same_search(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises MegapruneError if a saved search's settings are not those that are asked for."""
    for name, value in asked.items():
        if saved.get(name) != value:
            raise MegapruneError(
                f"cannot resume: the saved search has {name} = {saved.get(name)}, this run asks for {value}; give the "
                "saved run's flags again, or another --save"
            )


def protected_layers(spec: str, num_layers: int) -> frozenset[int]:
    """The layers named by `--protect-layers`, which no search may drop.

    `spec` is "none", or a comma-separated list of "first", "last" and layer numbers: 0 is the first,
    -1 the last. Raises UsageError for anything else and for layers that the model doesn't have.
    """
    if spec.strip() == "none":
        return frozenset()
    return frozenset(_protected_layer(word.strip(), num_layers) for word in spec.split(","))


def _protected_layer(word: str, num_layers: int) -> int:
    try:
        layer = {"first": 0, "last": -1}.get(word)
        layer = int(word) if layer is None else layer
    except ValueError:
        raise UsageError(
            f"--protect-layers: {word!r} is no layer; give 'none', or 'first', 'last' and layer numbers "
            "with commas between them, such as first,last,5"
        ) from None
    if not -num_layers <= layer < num_layers:
        raise UsageError(
            f"--protect-layers: there is no layer {layer} in a model of {num_layers}; "
            f"give numbers from 0 to {num_layers - 1}"
        )
    return layer % num_layers
