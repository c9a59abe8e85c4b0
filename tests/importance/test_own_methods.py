"""Methods registered outside the package, from the command line to the report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megaprune.cli.main import attempt
from megaprune.cli.prune import parse_config
from megaprune.selection.registry import registrations_undone
from megaprune.utils.errors import UsageError
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
METHODS = '''
"""Methods of a user's own."""

import megaprune.selection
from megaprune.selection.gumbel_topk import GumbelTopK


@megaprune.selection.register("deepest", calibrated=True)
def deepest(evaluator, budget, protected, *, seed, held_out):
    """Keep the layers without which the loss is highest."""
    assert seed == 1234 and held_out is not evaluator
    scores = evaluator.without_each(protected, "ce")
    held_out.losses([range(budget.num_layers)])
    order = scores.argsort(descending=True).tolist()
    return megaprune.selection.Choice(budget.take(order, protected), scores.nan_to_num(posinf=99.0))


@megaprune.selection.register("first", budgets=["layers"], contiguous=True, description="keep the % of first layers")
def first(budget, protected):
    return budget.take(range(budget.num_layers), protected)


@megaprune.selection.register("warm", searches=True)
def warm(budget, protected, num_steps, *, scores, seed):
    """Search from half of the first scores."""
    return GumbelTopK(scores / 2, budget, protected, num_steps, seed=seed)
'''


@pytest.fixture
def module(tmp_path):
    """The file of the user's methods, which are forgotten afterwards."""
    (tmp_path / "mine.py").write_text(METHODS)
    with registrations_undone():
        yield tmp_path / "mine.py"


def report_of(folder):
    return json.loads((folder / "report.json").read_text())


def test_a_calibrated_method_in_a_run(tiny_model, tiny_data, tmp_path, module):
    argv = tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "deepest")
    with pytest.raises(UsageError, match="--method: invalid choice: 'deepest'"):
        tiny.run_here(argv)
    tiny.run_here([*argv, "--method-module", str(module)])
    report = report_of(tmp_path / "run")
    assert report["method"] == "deepest" and len(report["kept_layers"]) == 5
    free = sorted(range(1, 6), key=lambda layer: report["scores"][layer])
    assert set(report["pruned_layers"]) == set(free[:2])
    # 4 windows without each layer, and 16 others of the original model's
    assert report["stages"]["importance"]["tokens"] > 20 * tiny.SEQ_LENGTH
    tiny.load_hf(tmp_path / "run" / "hf")


def test_a_search_in_a_run(tiny_model, tiny_data, tmp_path, module):
    argv = tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / "run", "--method", "warm")
    tiny.run_here([*argv, f"--method-module={module}", "--train-iters", "5", "--search-iters", "3"])
    report = report_of(tmp_path / "run")
    assert report["method"] == "warm" and len(report["kept_layers"]) == 5
    assert report["stages"]["search"]["tokens"] > 0 and report["stages"]["importance"]["tokens"] > 0


def test_an_alias_keeps_the_name_that_was_typed(tiny_model, tiny_data, tmp_path):
    for name in ("minitron", "shortgpt"):
        tiny.run_here(tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path / name, name))
    minitron, shortgpt = report_of(tmp_path / "minitron"), report_of(tmp_path / "shortgpt")
    assert (minitron["method"], shortgpt["method"]) == ("minitron", "shortgpt")
    assert (minitron["kept_layers"], minitron["scores"]) == (shortgpt["kept_layers"], shortgpt["scores"])


@pytest.mark.slow
def test_in_a_comparison(tiny_model, tiny_data, tmp_path, module):
    words = tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, tmp_path)
    flags = dict(zip([word.removeprefix("--") for word in words[::2]], words[1::2], strict=True))
    common = {key: flags[key] for key in flags if key not in ("save", "num-layers-to-prune", "search-iters")}
    common |= {"train-iters": 1, "lr-warmup-iters": 0, "method-module": str(module)}
    asked = {"run": common, "methods": ["deepest", "first"], "num_layers_to_prune": [2], "seeds": [1234]}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(asked))
    assert attempt("compare", ["--config", str(tmp_path / "c.yaml"), "--save", str(tmp_path / "out")]) == (0, None)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "deepest" in table and "first" in table
    assert report_of(tmp_path / "out/runs/first-2-seed1234")["kept_layers"] == [0, 1, 2, 3, 6]


def test_in_the_help(tmp_path, module):
    command = [sys.executable, "tools/prune.py", "--help", "--method-module", str(module)]
    done = subprocess.run(command, capture_output=True, text=True, env=tiny.environment(), cwd=ROOT)
    text = " ".join(done.stdout.split())
    assert "{auto,clp,deepest,e3,evolution,exhaustive,first," in text
    assert "deepest: Keep the layers without which the loss is highest." in text
    assert "first: keep the % of first layers" in text and "shortgpt or minitron: block influence" in text


def test_flags_follow_from_the_traits(module):
    own = ["--hf-model", "m", "--save", "s", "--train-data", "d", "--train-iters", "10"]
    own += ["--method-module", str(module)]

    def refused(*words):
        with pytest.raises(UsageError) as refusal:
            parse_config([*own, *words])
        return str(refusal.value)

    count = ("--num-layers-to-prune", "2")
    assert "finds a segment of a fixed number of layers" in refused("--method", "first", "--target-params", "9")
    assert "--search-weights is for methods that search" in refused(
        *("--method", "deepest", "--search-weights", "frozen"), *count
    )
    assert "--criterion is for --method shortened, not warm" in refused(
        *("--method", "warm", "--criterion", "taylor"), *count
    )
    endpoints = ("--recovery-layers", "endpoints")
    assert "--recovery-layers endpoints needs one contiguous cut, which --method warm" in refused(
        *("--method", "warm", *endpoints), *count
    )
    assert parse_config([*own, *count, "--method", "first", *endpoints]).tunes_endpoints
    assert parse_config([*own, *count, "--method", "warm"]).search_iters == 1
    assert parse_config([*own, *count, "--method", "first"]).search_iters == 0
    # data are asked for where the method looks at them
    without = ["--hf-model", "m", "--save", "s", "--train-iters", "0", *own[-2:], *count]
    with pytest.raises(UsageError, match="--train-data is required"):
        parse_config([*without, "--method", "deepest"])
    assert parse_config([*without, "--method", "first"])
