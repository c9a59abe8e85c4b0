import json
import math

import pytest
import torch

from megaprune.benchmarks.timing import SavedActivations, interleaved, median_ratio
from megaprune.benchmarks.train_step import table
from megaprune.cli.benchmark import run
from megaprune.utils.errors import UsageError

TINY = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "2", "--vocab-size", "64"),
    *("--seq-length", "16", "--micro-batch-size", "2", "--repeats", "2", "--warmup", "1"),
]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmark") / "result.json"
    run(["train-step", *TINY, "--output", str(output)])
    return json.loads(output.read_text())


def test_train_step_measures_every_case(result):
    assert [case["kept_layers"] for case in result["cases"]] == [4, 4, 3, 2, 2, 3, 3, 3, 3, 3]
    ideals = [1, 1, 2.5 / 3, 2 / 3, 1, 0.75, 1, 1 + 4 / 9, 0.5, 1 + 2 / 3]
    assert [case["ideal_ratio"] for case in result["cases"]] == pytest.approx(ideals)
    by_name = {case["case"]: case for case in result["cases"]}
    for case in result["cases"]:
        baseline = by_name[case["baseline"]]
        assert case["activation_ratio"] == case["activation_bytes"] / baseline["activation_bytes"]
    # no teacher adds to what autograd keeps but a loss of a few numbers a token
    for name in ("recovery, cached teacher", "recovery, online teacher", "adapters, self as teacher"):
        assert by_name[name]["activation_ratio"] < 1.2
    for case in result["cases"]:
        assert 0 < case["forward_backward_seconds"] < case["step_seconds"] < math.inf
        assert case["step_ratio"] > 0 and case["forward_backward_ratio"] > 0
        assert len(case["rounds"]) == 2 and all(0 < r["forward_backward"] < r["step"] for r in case["rounds"])
        assert case["tokens_per_second"] == pytest.approx(2 * 16 / case["step_seconds"])
    plain = result["cases"][0]
    assert plain["step_ratio"] == plain["forward_backward_ratio"] == plain["activation_ratio"] == 1


def test_masked_layers_keep_no_activations(result):
    plain, nothing, quarter, half, naive = (case["activation_bytes"] for case in result["cases"][:5])
    assert nothing == naive and plain <= nothing < 1.01 * plain
    assert nothing - quarter == pytest.approx(quarter - half, rel=0.01)
    # Half of the layers, what stands outside the layers, and one output of each masked layer.
    assert 0.5 * plain < half < 0.6 * plain


def test_table_names_every_case(result):
    lines = table(result).splitlines()
    assert len(lines) == 2 + len(result["cases"]) and len({len(line) for line in lines[1:]}) == 1
    assert all(line.startswith(case["case"]) for line, case in zip(lines[2:], result["cases"], strict=True))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a benchmark: train-step"),
        (["train"], "unknown benchmark 'train'"),
        (["train-step", "--num-layers", "3"], "--num-layers 3 is less than 4"),
        (["train-step", "--repeats", "0"], "--repeats 0"),
        (["train-step", "--hidden-size", "36", "--num-attention-heads", "4"], "--hidden-size 36"),
        (["train-step", "--num-query-groups", "3"], "--num-query-groups 3"),
        (["train-step", "--output", "."], "--output"),
        (["train-step", "--tensor-model-parallel-size", "2"], "--tensor-model-parallel-size 2"),
        (["train-step", "--hidden-sizes", "3"], "--hidden-sizes"),
    ],
)
def test_wrong_flags_are_refused(argv, message):
    with pytest.raises(UsageError, match=message):
        run(argv)


def test_interleaved_rounds_rotate_and_leave_the_warm_up_out():
    calls = []
    samples = interleaved({name: lambda name=name: calls.append(name) or len(calls) for name in "abc"}, 2, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert samples == {"a": [6, 8], "b": [4, 9], "c": [5, 7]}


def test_median_ratio_compares_within_a_round():
    assert median_ratio([1.0, 20.0, 3.0], [2.0, 40.0, 3.0]) == 0.5


def test_saved_activations_count_a_storage_once_and_no_parameter():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(4, 8)
    saved = SavedActivations([weight])
    with saved:
        hidden = x @ weight  # saves x
        doubled = hidden * hidden.view(-1).view(4, 8)  # saves hidden twice
        loss = (doubled @ weight).sum()  # saves doubled
        assert saved.held == saved.peak == 3 * x.nbytes
        loss.backward()
    assert saved.held == 0 and saved.peak == 3 * x.nbytes


def test_convert_measures_every_case(tmp_path):
    argv = ["convert", "--size-gb", "0.03", "--hidden-size", "512", "--repeats", "1", "--no-transformers"]
    run([*argv, "--folder", str(tmp_path), "--output", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert [record["case"] for record in result["cases"]] == ["cp", "import", "export"]
    for record in result["cases"]:
        assert record["seconds"] > 0 and record["peak_bytes"] > 2**20 and record["processor_seconds"] >= 0
    assert result["cases"][0]["ratio"] == 1
    assert all(record["bit_equal"] for record in result["fp8"])
    assert list(tmp_path.iterdir()) == [tmp_path / "out.json"]


@pytest.mark.parametrize("words", ["--size-gb 0", "--repeats 0", "--hidden-size 100"])
def test_wrong_flags_of_convert_are_refused(words):
    with pytest.raises(UsageError, match=words.split()[0]):
        run(["convert", *words.split()])


def test_teacher_cache(tiny_model, tiny_data, tmp_path):
    flags = ["--hf-model", tiny_model("qwen3_tied"), "--data", tiny_data / "valid.jsonl", "--seq-length", 16]
    flags += ["--windows", 10, "--repeats", 1, "--output", tmp_path / "result.json"]
    run(["teacher-cache", *map(str, flags)])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [case["case"] for case in result["cases"]] == ["forward pass", "and top k", "and written", "read"]
    assert all(case["tokens_per_second"] > 0 for case in result["cases"])
    assert result["bytes_per_token"] == 45 + 4 / 16
    largest = {row["encoding"]: row["largest"] for row in result["encodings"] if row["student"] == "near"}
    assert min(largest, key=largest.get).endswith("(stored)") and max(largest, key=largest.get) == "bf16 logits"


@pytest.mark.parametrize(
    ("argv", "message"),
    [([], "--hf-model and --data are required"), (["--windows", "0"], "--windows 0 is less than 1")],
)
def test_teacher_cache_refuses(argv, message):
    with pytest.raises(UsageError, match=message):
        run(["teacher-cache", *argv])
