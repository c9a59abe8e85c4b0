"""On every rank, the searched student is out of memory before the pruned one is built."""

import json

import pytest

from tests.parallel.layouts import FREED_LAYOUTS


@pytest.mark.parametrize("layout", FREED_LAYOUTS)
def test_searched_student_is_gone_before_the_pruned_one_is_built(results, layout):
    folder = results(2).path(f"freed-{layout}").parent
    for rank in range(2):
        moments, built = json.loads((folder / f"freed-{layout}.{rank}").read_text())
        at = dict(moments)
        assert list(at) == ["model 1", "model 2", "model 3", "export"]
        assert built["trainer 1"] > 3 and built["trainer 1 state"] > 3
        assert at["model 3"] == {"model 2": built["model 2"]}  # the teacher
        assert at["export"].keys() == {"model 3", "trainer 2"}
