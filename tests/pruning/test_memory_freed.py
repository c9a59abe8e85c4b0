"""Models and training state are freed before the next stage builds its model, whenever garbage is collected."""

import pytest

from tests.helpers import tiny
from tests.helpers.living import watched

pytestmark = pytest.mark.slow


def moments_of(argv):
    with watched() as living:
        tiny.run_here(argv)
    return living


@pytest.mark.parametrize("extra", [(), ("--bf16", "--use-distributed-optimizer", "--average-weights", "0.5")])
def test_searched_student_is_gone_before_the_pruned_one_is_built(tiny_model, tiny_data, tmp_path, extra):
    living = moments_of(tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", *extra))
    # the student, its teacher, and the pruned student
    assert list(dict(living.moments)) == ["model 1", "model 2", "model 3", "export"]
    assert all(len(living.tensors[name]) > 30 for name in ("model 1", "model 2", "model 3"))
    assert living.tensors["trainer 1 state"] and living.tensors["trainer 2 state"]
    at = dict(living.moments)
    assert at["model 3"] == {"model 2": len(living.tensors["model 2"])}
    # the export needs the weights of the student alone
    assert at["export"].keys() == {"model 3", "trainer 2"} and at["export"]["trainer 2"] == 1


def test_gradients_of_the_importance_are_gone_before_the_student_is_built(tiny_model, tiny_data, tmp_path):
    argv = tiny.select_argv(tiny_model("llama3"), tiny_data, tmp_path / "run", "shortened", "--criterion", "taylor")
    living = moments_of([*argv, "--train-iters", "2"])
    at = dict(living.moments)
    assert len(living.tensors["importance"]) == 2
    # model 1, which was measured, is the teacher of model 2
    assert at["model 2"] == {"model 1": len(living.tensors["model 1"])}
    assert at["export"].keys() == {"model 2", "trainer 1"}


def test_original_is_gone_if_it_does_not_teach(tiny_model, tiny_data, tmp_path):
    argv = tiny.select_argv(tiny_model("llama2"), tiny_data, tmp_path / "run", "shortgpt")
    living = moments_of([*argv, "--train-iters", "2", "--distill-loss", "ce"])
    assert dict(living.moments)["model 2"] == {}


def test_each_healed_candidate_is_gone_before_the_next(tiny_model, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr("megaprune.pruning.candidates.CLOSE", 1e9)
    living = moments_of(tiny.healed_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run"))
    builds = [alive for what, alive in living.moments if what.startswith("model")]
    assert len(builds) == 5  # the original, two candidates, the better one to save it, and the same in recovery
    assert all(alive == {"model 1": len(living.tensors["model 1"])} for alive in builds[1:])


def test_each_round_is_gone_before_the_next(tiny_model, tiny_data, tmp_path):
    living = moments_of(tiny.rounds_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run"))
    first = [number for number, (what, _) in enumerate(living.moments) if what == "export"][0]
    assert living.moments[first + 1][1] == {}
    last = living.moments[-1][1]
    assert len([name for name in last if name.startswith("model")]) == 1
