import math

import pytest
import torch

from megaprune.selection.initial_scores import scores_from_kl
from megaprune.utils.errors import MegapruneError

PROTECTED = frozenset({0, 5})


def test_scores_are_standardized_logarithms_of_the_free_layers():
    kl = torch.tensor([50.0, 0.01, 0.1, 1.0, 10.0, 50.0])
    scores = scores_from_kl(kl, PROTECTED)
    # The logarithms are evenly spaced: standardized, four such are -3, -1, 1, 3 over sqrt(5).
    expected = torch.tensor([3.0, -3.0, -1.0, 1.0, 3.0, 3.0]) / math.sqrt(5)
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(scores_from_kl(kl, PROTECTED, scale=2.0), 2 * expected)


def test_kl_of_protected_layers_need_not_be_known():
    kl = torch.tensor([torch.nan, 0.1, 0.2, 0.3, 0.4, torch.inf])
    scores = scores_from_kl(kl, PROTECTED)
    assert scores.isfinite().all()
    assert scores[0] == scores[5] == scores[4] == scores.max()


def test_zero_and_negative_kl_are_rounding():
    scores = scores_from_kl(torch.tensor([0.0, -1e-7, 0.0, 1e-7, 0.5, 0.0]), PROTECTED)
    assert scores[1] == scores[2] == scores[3] < scores[4]
    assert scores.abs().max() < 2


def test_equal_kl_give_no_preference():
    assert scores_from_kl(torch.full((6,), 0.3), PROTECTED).eq(0).all()
    assert scores_from_kl(torch.tensor([0.1, 0.2, 0.1]), frozenset({0, 2})).eq(0).all()
    assert scores_from_kl(torch.tensor([0.1, 0.2]), frozenset({0, 1})).eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_kl_that_is_not_finite_names_the_layer(value):
    kl = torch.ones(6)
    kl[3] = value
    with pytest.raises(MegapruneError, match="without layer 3"):
        scores_from_kl(kl, PROTECTED)
