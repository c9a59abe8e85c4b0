"""Interface of every search during training, and checks that all ways of selecting layers share."""

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from megaprune.selection.budget import Budget
from megaprune.utils.errors import MegapruneError, UsageError


class Selector(Protocol):
    """Search that learns which layers stay, from the gradient of the loss with respect to a mask over the layers.

    A training step is `mask(step)`, forward and backward through the model with that mask, then
    `update(mask_grad, step)`. Every rank holds the same selector and passes it the same gradient, so all
    ranks hold the same mask without communication. Layers and steps count from 0.
    """

    num_layers: int
    budget: Budget

    def mask(self, step: int) -> Tensor:
        """Return the mask, [num_layers] fp32 on the CPU, detached; 1 keeps a layer, 0 bypasses it."""

    def update(self, mask_grad: Tensor, step: int) -> None:
        """Move the scores by `mask_grad`, [num_layers], the loss's gradient at `mask(step)`.

        A `WindowSelector` receives [windows, num_layers], the gradient at its `window_masks`.
        """

    @property
    def scores(self) -> Tensor:
        """Scores, [num_layers] fp32 on the CPU, detached; higher is kept."""

    def temperature(self, step: int) -> float:
        """Return the relaxation's temperature at this step."""

    def kept_layers(self) -> list[int]:
        """Return the layers that stay at the end of the search, ascending, within the budget."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain data only; enough to continue the same trajectory bit for bit."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a saved state.

        Raises:
            MegapruneError: the saved search had other settings.
        """


@runtime_checkable
class WindowSelector(Protocol):
    """Selector whose mask may differ between the windows of a step; its `update` takes a gradient per window."""

    def window_masks(self, step: int, count: int) -> Tensor:
        """Return the mask of each window of the step's global batch, [count, num_layers] fp32 on the CPU."""


def check_gradient(mask_grad: Tensor, step: int) -> None:
    """Check that the gradient of a search's step is finite.

    Raises:
        MegapruneError: it is not.
    """
    if not mask_grad.isfinite().all():
        raise MegapruneError(
            f"the mask's gradient at search step {step} is not finite: the loss has diverged, lower --lr"
        )


def check_same_search(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Check that a saved search has the settings of this run.

    Raises:
        MegapruneError: a setting differs; names it.
    """
    for name, value in asked.items():
        if saved.get(name) != value:
            raise MegapruneError(
                f"cannot resume: the saved search has {name} = {saved.get(name)}, this run asks for {value}; give the "
                "saved run's flags again, or another --save"
            )


def check_settings(num_steps: int, temperature: float, anneal: float, ramp: float) -> None:
    """Check the settings that the Gumbel-TopK searches share.

    Raises:
        UsageError: names the flag.
    """
    for flag, value, valid, remedy in [
        ("--search-iters", num_steps, num_steps >= 1, "give at least 1"),
        ("--gumbel-temperature", temperature, temperature > 0, "give a number above 0, such as 1.0"),
        ("--gumbel-anneal", anneal, 0 <= anneal < 1, "give a number from 0 to below 1, such as 0.9"),
        ("--mask-ramp", ramp, 0 < ramp <= 1, "give a share of the search, above 0 and at most 1"),
    ]:
        if not valid:
            raise UsageError(f"{flag}: cannot be {value}; {remedy}")


def protected_layers(spec: str, num_layers: int) -> frozenset[int]:
    """Return the layers named by `--protect-layers`, which no search may drop.

    Args:
        spec: "none", or a comma-separated list of "first", "last" and layer numbers: 0 is the first, -1 the last.

    Raises:
        UsageError: the list contains anything else, or a layer that the model does not have.
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
            f"--protect-layers: {word!r} is not a layer; give 'none', or 'first', 'last' and layer numbers "
            "with commas between them, such as first,last,5"
        ) from None
    if not -num_layers <= layer < num_layers:
        raise UsageError(
            f"--protect-layers: there is no layer {layer} in a model of {num_layers}; "
            f"give numbers from 0 to {num_layers - 1}"
        )
    return layer % num_layers
