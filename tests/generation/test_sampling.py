"""The choice of the next token from logits and a draw."""

import math

import pytest
import torch

from megaprune.generation.engines import Sampling, TokenChoice
from megaprune.utils.errors import MegapruneError

PROBS = [0.4, 0.3, 0.2, 0.0, 0.1]


def frequencies(temperature=1.0, top_p=1.0, num_tokens=5, draws=4000):
    """Return how often each token is chosen, each time by another seed."""
    choice = TokenChoice(Sampling(temperature, top_p, 1, num_tokens), range(draws))
    scores = choice(torch.empty(draws, 0), torch.tensor(PROBS).log().repeat(draws, 1))
    assert (scores > -torch.inf).sum() == draws
    return torch.bincount(scores.argmax(-1), minlength=5) / draws


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 0.5}, [p * p / 0.3 for p in PROBS]),
        ({"top_p": 0.7}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0]),
        ({"num_tokens": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
    ],
)
def test_tokens_are_chosen_by_their_probability(options, expected):
    found = frequencies(**options)
    assert found.tolist() == pytest.approx(expected, abs=0.03)
    assert [p == 0 for p in found.tolist()] == [p == 0 for p in expected]


def test_a_row_draws_from_its_own_seed():
    logits = torch.zeros(3, 100_000)

    def chosen(seeds):
        choice = TokenChoice(Sampling(1.0, 1.0, 1, 100_000), seeds)
        return [choice(torch.empty(0), logits[: len(seeds)]).argmax(-1).tolist() for _ in range(3)]

    assert [step[1:] for step in chosen([4, 5, 6])] == chosen([5, 6])
    assert len({step[0] for step in chosen([4])}) == 3


def test_temperature_0_is_greedy():
    scores = TokenChoice(Sampling(0.0, 1.0, 1, 4), [0])(torch.empty(0), torch.tensor([PROBS[::-1]]).log())
    assert scores.argmax() == 3
    assert scores[0, 4] == -torch.inf  # the most probable one is no token of the tokenizer


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(MegapruneError, match=r"logits aren't finite"):
        TokenChoice(Sampling(1.0, 1.0, 1, 4), [0])(torch.empty(0), torch.full((1, 4), math.nan))
