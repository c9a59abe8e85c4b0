"""Budget of the layers that stay: a number of layers, or of parameters."""

from collections.abc import Iterable, Set
from dataclasses import dataclass

from megaprune.utils.errors import UsageError


@dataclass(frozen=True)
class Budget:
    """Costs of the layers, and the maximum total cost of the layers that stay, in whole units.

    If every layer costs 1, the limit is the number of layers that stay, and every selection has exactly that many. If
    dense and MoE layers have different costs, a selection is exact in this sense: it costs at most the limit, and no
    layer that is left out would still fit.

    Attributes:
        flag, unit: the flag that gives the limit, and the unit of costs other than layers, for messages.
    """

    costs: tuple[int, ...]
    limit: int
    flag: str = "--target-params"
    unit: str = "parameters"

    @classmethod
    def of_layers(cls, num_layers: int, num_kept: int) -> "Budget":
        """Return a budget for `num_kept` layers of equal cost."""
        return cls((1,) * num_layers, num_kept)

    @property
    def num_layers(self) -> int:
        """Return the number of layers of the whole model."""
        return len(self.costs)

    @property
    def counts_layers(self) -> bool:
        """Return whether the unit is the layer."""
        return set(self.costs) == {1}

    def take(self, order: Iterable[int], protected: Set[int] = frozenset()) -> list[int]:
        """Return the protected layers, and in this order each other layer that still fits; ascending."""
        room = self.limit - sum(self.costs[layer] for layer in protected)
        taken = list(protected)
        for layer in order:
            if layer not in protected and self.costs[layer] <= room:
                taken.append(layer)
                room -= self.costs[layer]
        return sorted(taken)

    def fewest_layers(self, protected: Set[int]) -> list[int]:
        """Return the selection that prefers the most expensive layers; ties keep the lower layer."""
        return self.take(sorted(range(self.num_layers), key=lambda layer: -self.costs[layer]), protected)

    def check(self, protected: Set[int]) -> None:
        """Check that the budget leaves at least one layer and has room for the protected layers.

        Raises:
            UsageError: it does not.
        """
        if self.counts_layers:
            self._check_number(protected)
            return
        at_least = sum(self.costs[layer] for layer in protected) or min(self.costs)
        if self.limit < at_least:
            who = f"those that --protect-layers keeps ({_listed(protected)})" if protected else "the smallest layer"
            raise UsageError(
                f"{self.flag}: leaves {self.limit:,} {self.unit} for layers, but {who} have {at_least:,}; "
                "raise it or protect fewer layers"
            )

    def limit_of_round(self, number: int, rounds: int) -> int:
        """Return the limit at the end of a round, from 1, if each round removes an equal share."""
        total = sum(self.costs)
        return total - (total - self.limit) * number // rounds

    def check_rounds(self, rounds: int) -> None:
        """Check that each round removes a layer.

        Raises:
            UsageError: there are too many rounds.
        """
        excess, most = sum(self.costs) - self.limit, max(self.costs)
        if rounds > 1 and excess // rounds < most:
            raise UsageError(
                f"--rounds {rounds}: not every round can remove a layer; give at most {max(1, excess // most)}"
            )

    def _check_number(self, protected: Set[int]) -> None:
        num_pruned = self.num_layers - self.limit
        if not 0 < self.limit <= self.num_layers:
            raise UsageError(
                f"--num-layers-to-prune: cannot prune {num_pruned} of {self.num_layers} layers; "
                f"give a number from 0 to {self.num_layers - 1}"
            )
        if self.limit < len(protected):
            raise UsageError(
                f"--num-layers-to-prune: pruning {num_pruned} of {self.num_layers} layers leaves {self.limit}, but "
                f"--protect-layers keeps {len(protected)} ({_listed(protected)}); "
                f"prune at most {self.num_layers - len(protected)} or protect fewer"
            )


def _listed(layers: Set[int]) -> str:
    return ", ".join(map(str, sorted(layers)))
