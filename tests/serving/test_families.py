"""Pruned models of every family in vLLM: the tokens and log-probabilities that transformers computes."""

import json

import pytest

import megaprune
from tests.serving import models
from tests.serving.engine import ask, difference, engine, prompts

pytestmark = pytest.mark.serving

# Of fp32, where sums are in another order.
ROUNDING = 1e-4


def served(folder):
    with engine(folder) as model:
        answers = ask(model, prompts())
    return difference(models.as_transformers_reads_it(folder), prompts(), answers)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_export_is_served_as_its_source_is(family, tmp_path, record_row):
    source, pruned = models.make_model(tmp_path / "source", family), tmp_path / "pruned"
    megaprune.remove_layers(source, layers=[1, 3], save=pruned)
    theirs, ours = served(source), served(pruned)
    yes = {True: "yes", False: "no"}
    record_row(
        f"`{family}`",
        *(yes[each.same_tokens] for each in (theirs, ours)),
        *(f"{each.logprob:.1e}" for each in (theirs, ours)),
    )
    assert ours.same_tokens
    assert ours.logprob <= max(2 * theirs.logprob, ROUNDING)


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_a_source_as_transformers_saves_it_gives_an_export_that_vllm_routes_rightly(family, tmp_path):
    source, pruned = models.make_model(tmp_path / "source", family), tmp_path / "pruned"
    models.edit_config(source, topk_method=None, scoring_func=None)
    megaprune.remove_layers(source, layers=[1, 3], save=pruned)
    assert json.loads((pruned / "config.json").read_text())["scoring_func"] == "sigmoid"
    found = served(pruned)
    assert found.same_tokens and found.logprob <= ROUNDING
