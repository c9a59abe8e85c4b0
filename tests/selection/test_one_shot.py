import pytest
import torch

from megaprune.selection.budget import Budget
from megaprune.selection.one_shot import manual_layers, random_layers, top_layers
from megaprune.utils.errors import MegapruneError, UsageError


def test_top_layers_are_the_best_and_the_protected():
    scores = torch.tensor([-9.0, 3.0, 1.0, 2.0, -9.0])
    assert top_layers(scores, Budget.of_layers(len(scores), 4), frozenset({0, 4})) == [0, 1, 3, 4]
    assert top_layers(scores, Budget.of_layers(len(scores), 2), frozenset({0, 4})) == [0, 4]
    assert top_layers(scores, Budget.of_layers(len(scores), 5), frozenset()) == [0, 1, 2, 3, 4]


def test_equal_scores_keep_the_lower_layer():
    assert top_layers(torch.zeros(40), Budget.of_layers(40, 3), frozenset({39})) == [0, 1, 39]


def test_scores_that_are_not_numbers_are_refused_where_they_count():
    scores = torch.tensor([torch.nan, 1.0, 2.0])
    assert top_layers(scores, Budget.of_layers(len(scores), 2), frozenset({0})) == [0, 2]
    with pytest.raises(MegapruneError, match="layer 0"):
        top_layers(scores, Budget.of_layers(len(scores), 2), frozenset())


def test_random_layers():
    protected = frozenset({0, 15})
    draws = [random_layers(Budget.of_layers(16, 8), protected, seed) for seed in range(50)]
    for kept in draws:
        assert kept == sorted(set(kept)) and len(kept) == 8 and protected <= set(kept) <= set(range(16))
    assert draws[7] == random_layers(Budget.of_layers(16, 8), protected, 7)
    assert len({tuple(kept) for kept in draws}) > 40
    assert set().union(*draws) == set(range(16))


def test_manual_layers_may_prune_any():
    assert manual_layers(5, [3, 0]) == [1, 2, 4]


@pytest.mark.parametrize("pruned", [[], [5], [-1], [1, 1], [0, 1, 2, 3, 4]])
def test_bad_manual_layers_name_the_flag(pruned):
    with pytest.raises(UsageError, match="--prune-layers"):
        manual_layers(5, pruned)
