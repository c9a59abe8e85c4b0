import itertools

import pytest

from megaprune.mcore.pipeline_layout import balanced_stages, layout_string, parse_layout
from megaprune.utils.errors import UsageError


def dearest(stages, costs, last_stage_cost):
    costs, totals = list(costs), []
    for count in stages:
        totals.append(sum(costs[:count]))
        costs = costs[count:]
    return max([*totals[:-1], totals[-1] + last_stage_cost])


def every_cut(num_layers, num_stages):
    for cuts in itertools.combinations(range(1, num_layers), num_stages - 1):
        yield [end - start for start, end in itertools.pairwise((0, *cuts, num_layers))]


@pytest.mark.parametrize("costs", [[1] * 7, [1, 2, 3, 4, 5], [5, 1, 1, 1, 5, 1], [0.5, 9, 0.5, 0.5, 3, 3, 3, 1]])
@pytest.mark.parametrize("last_stage_cost", [0, 2, 30])
def test_no_cut_is_better(costs, last_stage_cost):
    for num_stages in range(1, len(costs) + 1):
        stages = balanced_stages(costs, num_stages, last_stage_cost)
        assert len(stages) == num_stages and sum(stages) == len(costs) and min(stages) > 0
        best = min(dearest(cut, costs, last_stage_cost) for cut in every_cut(len(costs), num_stages))
        assert dearest(stages, costs, last_stage_cost) == best


def test_of_equal_cuts_the_first_stages_hold_more():
    assert balanced_stages([1] * 7, 2) == [4, 3]
    assert balanced_stages([1] * 7, 4) == [2, 2, 2, 1]
    assert balanced_stages([1] * 8, 2, last_stage_cost=2) == [5, 3]


def test_fewer_layers_than_stages_are_refused():
    with pytest.raises(UsageError, match=r"--pipeline-model-parallel-size 4 .* only 3 layers"):
        balanced_stages([1] * 3, 4)


@pytest.mark.parametrize("stages", [[7], [4, 3], [1, 5, 1]])
def test_layouts_are_read_as_they_are_written(stages):
    assert parse_layout(layout_string(stages), len(stages), 7) == stages


@pytest.mark.parametrize(
    ("layout", "num_stages"),
    [
        ("Ettt|tttL", 2),  # a layer too few
        ("Etttt|ttttL", 2),  # one too many
        ("Etttt|tttL", 3),  # stages that the processes don't make
        ("Ett|tt|tt|tL", 2),  # two chunks a rank
        ("tttt|tttL", 2),  # no embedding
        ("Etttt|ttt", 2),  # no loss
        ("Exttt|tttL", 2),
    ],
)
def test_layouts_that_do_not_fit_are_refused(layout, num_stages):
    with pytest.raises(UsageError, match="--pipeline-model-parallel-layout"):
        parse_layout(layout, num_stages, 7)
