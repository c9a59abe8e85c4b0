"""docs/families.md is what its generator makes of the tables. Plans of all models take a minute: here, of two."""

from pathlib import Path

import pytest

from megaprune.models import FAMILIES
from tests.helpers import families_page

PAGE = Path(__file__).parents[2].joinpath("docs", "families.md").read_text()


def test_models_and_recipes_are_those_of_the_tables():
    for part in families_page.parts_without_plans():
        assert part in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("model", ["phi-4", "glm-4.5-air"])
def test_plans_are_those_of_the_planner(model):
    row = next(row for row in families_page.ROWS if row.model == model)
    assert families_page.plan_row(row) in PAGE


def test_every_family_is_named():
    for model_type in FAMILIES:
        assert f"`{model_type}`" in PAGE, model_type
