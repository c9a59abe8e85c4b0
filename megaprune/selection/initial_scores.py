"""Initial scores of a search: the harm that the removal of each layer does (E3-Pruner, initial scores)."""

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from megaprune.utils.errors import MegapruneError

# Nats per token. A smaller KL is fp32 rounding noise of either sign, whose logarithm would be an outlier.
MIN_KL = 1e-6


def scores_from_kl(kl: Tensor, protected: Set[int], scale: float = 1.0, costs: Sequence[int] | None = None) -> Tensor:
    """Return scores, higher = keep, from `kl[l]` = KL(original || model without layer l) in nats per token.

    Both are [num_layers]; the result is fp32 on the CPU. The paper uses the KLs directly. Here, scores are
    their logarithms, standardized over the unprotected layers to mean 0 and standard deviation `scale`, because
    the outliers of the KLs hide the Gumbel noise (standard deviation 1.28) with which the search explores.
    With `costs`, [num_layers], the score is KL per cost: the harm per removed parameter, if dense and MoE layers
    differ in cost. Protected layers, whose KL is not needed, get the highest score.

    Raises:
        MegapruneError: the KL of an unprotected layer is not finite.
    """
    kl = kl.detach().cpu().double()
    free = [layer for layer in range(len(kl)) if layer not in protected]
    scores = torch.zeros(len(kl))
    if not free:
        return scores
    check_finite(kl, free)
    logs = kl[free].clamp_min(MIN_KL).log()
    if costs is not None:
        logs = logs - torch.tensor(costs, dtype=torch.float64)[free].log()
    deviation = logs.std(correction=0)
    # Logarithms of equal KLs may differ by rounding, which must not be scaled up to `scale`.
    standardized = (logs - logs.mean()) / deviation if deviation > 1e-12 else torch.zeros_like(logs)
    scores[free] = (scale * standardized).float()
    scores[sorted(protected)] = scores[free].max()
    return scores


def raw_scores(kl: Tensor, protected: Set[int], costs: Sequence[int]) -> Tensor:
    """Return the KLs themselves as scores (E3-Pruner), [num_layers] fp32 on the CPU, divided by the layers' relative
    costs. Protected layers get the highest score.

    Raises:
        MegapruneError: the KL of an unprotected layer is not finite.
    """
    free = [layer for layer in range(len(kl)) if layer not in protected]
    check_finite(kl, free)
    relative = torch.tensor(costs, dtype=torch.float64) / max(costs)
    scores = (kl.detach().cpu().double() / relative).float()
    scores[sorted(protected)] = scores[free].max() if free else 0.0
    return scores


def check_finite(kl: Tensor, layers: Sequence[int]) -> None:
    """Check the KLs of these layers.

    Raises:
        MegapruneError: one is not finite.
    """
    for layer in layers:
        if not kl[layer].isfinite():
            raise MegapruneError(
                f"the KL without layer {layer} is {kl[layer].item()}, not a finite number: check the source "
                "weights, and that the calibration data has tokens"
            )
