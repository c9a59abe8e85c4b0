"""The task files that come with megaprune against the harness's own on the same items, and where data are found."""

import json
from pathlib import Path

import datasets
import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from megaprune.cli.evaluate import run
from megaprune.evaluation.harness import headline, mean_score
from megaprune.evaluation.task_files import SHIPPED, load_tasks, shipped_tasks
from megaprune.utils.errors import MegapruneError, UsageError
from tests.helpers.benchmarks import FILES, OWN, write_benchmarks
from tests.helpers.tiny import load_hf, make_model, make_tokenizer

HARNESS = Path(lm_eval.__file__).parent / "tasks"
OWN_FILES = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "logiqa": "logiqa/logiqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), "llama3")


@pytest.fixture(autouse=True)
def on_cpu_without_network(monkeypatch):
    def connect(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("megaprune.device.torch_device", lambda: torch.device("cpu"))


def own_task(name):
    """Return the harness's own task with the items of the tests in the place of its data on the hub."""
    config = load_yaml(HARNESS / OWN_FILES[name])
    for key in ("dataset_path", "dataset_name", "tag"):
        config.pop(key, None)
    items = datasets.Dataset.from_list(OWN[name])
    splits = datasets.DatasetDict({split: items for split in ("train", "validation", "test")})
    config["custom_dataset"] = lambda **_: splits
    return TaskManager(include_defaults=False).load([config])["tasks"][name]


def requests(task, num_fewshot=0):
    task.set_config("num_fewshot", num_fewshot)
    task.build_all_requests()
    return [request.args for request in task.instances]


@pytest.mark.parametrize("name", OWN)
def test_prompts_are_the_harness_own(name, data):
    (ours,) = load_tasks([name], str(data))
    assert requests(ours) == requests(own_task(name))
    assert ours.config.output_type == own_task(name).config.output_type


def test_every_task_that_comes_is_compared():
    assert shipped_tasks() == {name: f"{FILES.get(name, name)}.jsonl" for name in OWN}


def scores(model, tasks):
    lm = HFLM(pretrained=load_hf(model), tokenizer=make_tokenizer(), batch_size=4)
    return lm_eval.simple_evaluate(lm, tasks=tasks, bootstrap_iters=10, log_samples=False)["results"]


@pytest.mark.slow
def test_scores_are_the_harness_own(model, data, tmp_path):
    names = [name for name in OWN if name != "gsm8k"]  # its prompts with solved items are beyond the tiny model
    expected = scores(model, [own_task(name) for name in names])
    output = tmp_path / "found.json"
    words = ["--hf-model", model, "--tasks", ",".join(names), "--task-path", data, "--output", output]
    run([*map(str, words), "--task-batch-size", "3"])
    found = json.loads(output.read_text())
    assert "data" not in found and found["dtype"] == "float32"
    assert len({values["acc,none"] for values in expected.values()}) > 2  # not all right or all wrong
    for name in names:
        accuracies = {metric for metric in expected[name] if metric.startswith("acc")}
        assert {metric: found["tasks"][name][metric] for metric in accuracies} == {
            metric: pytest.approx(expected[name][metric]) for metric in accuracies
        }
        assert found["tasks"][name]["items"] == len(OWN[name])
    assert found["tasks"]["lambada_openai"]["perplexity,none"] == pytest.approx(
        expected["lambada_openai"]["perplexity,none"], rel=1e-3
    )


def test_limit_and_the_table(model, data, tmp_path, capsys):
    words = ["--hf-model", model, "--tasks", "arc_easy,copa", "--task-path", data, "--task-limit", 2]
    run([*map(str, words), "--output", str(tmp_path / "found.json"), "--dtype", "bf16", "--num-fewshot", "1"])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["dtype"] == "bfloat16"
    assert [found["tasks"][name]["items"] for name in ("arc_easy", "copa")] == [2, 2]
    printed = capsys.readouterr().out
    task = found["tasks"]["arc_easy"]
    assert f"arc_easy acc,none       {task['acc,none']:.4f} ± {task['acc_stderr,none']:.4f}" in printed
    mean = (task["acc_norm,none"] + found["tasks"]["copa"]["acc,none"]) / 2
    assert found["tasks_mean"]["score"] == pytest.approx(mean)
    assert f"mean of tasks           {mean:.4f} ± {found['tasks_mean']['stderr']:.4f}" in printed


def test_solved_items_come_from_the_file_but_never_the_item_itself(data):
    (task,) = load_tasks(["gsm8k"], str(data))
    prompts = [context for context, _ in requests(task, num_fewshot=2)]
    for prompt, item in zip(prompts, OWN["gsm8k"], strict=True):
        assert prompt.endswith(f"Question: {item['question']}\nAnswer:")
        assert prompt.count(item["question"]) == 1 and prompt.count("#### ") == 2


OWN_TASK = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: parts/capitals.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
"""


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """A folder with a task file whose data path is relative to it, and a group; the working directory is another."""
    folder = tmp_path / "tasks"
    (folder / "geo" / "parts").mkdir(parents=True)
    (folder / "geo" / "capitals.yaml").write_text(OWN_TASK)
    (folder / "geo" / "all.yaml").write_text("group: geography\ntask: [capitals]\n")
    item = {"query": "The capital of Norway is", "choices": ["Oslo", "Bonn"], "gold": 0}
    (folder / "geo" / "parts" / "capitals.jsonl").write_text(json.dumps(item) + "\n")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["capitals", "geography", "tasks/geo/capitals.yaml"])
def test_relative_data_are_found_beside_the_task_file(own_folder, name):
    (found,) = load_tasks([name], None if "/" in name else "tasks")
    task = found.get_all_tasks()[0] if name == "geography" else found
    assert requests(task) == [("The capital of Norway is", " Oslo"), ("The capital of Norway is", " Bonn")]


def test_own_task_file_goes_before_the_one_that_comes(own_folder):
    write_benchmarks(own_folder)
    (own_folder / "piqa.yaml").write_text(OWN_TASK.replace("capitals", "piqa").replace("parts/piqa", "copa"))
    (task,) = load_tasks(["piqa"], str(own_folder))
    assert requests(task)[0][0] == "The glass fell, therefore"


def test_the_stock_harness_reads_the_task_files(data):
    manager = TaskManager(include_path=str(SHIPPED), include_defaults=False, metadata={"data_dir": str(data)})
    assert len(manager.load(["piqa"])["tasks"]["piqa"].test_docs()) == len(OWN["piqa"])


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        (
            "piqa",
            '{"query": "Question: a\\n", "choices": ["b", "c"], "gold": 0}\n{oh\n',
            "piqa.jsonl, line 2 is not a JSON object",
        ),
        ("piqa", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 1: gold 2 is the index of none of its 2"),
        ("piqa", "\n", "piqa.jsonl holds no items"),
        ("logi_qa", '{"query": "a", "choices": ["A", "B"], "gold": 0}', "logiqa: no 'Context: "),
    ],
)
def test_damaged_data_are_named_before_the_model_is_read(tmp_path, file, text, reason):
    (tmp_path / f"{file}.jsonl").write_text(text)
    words = ["--hf-model", "nowhere", "--data", "none.jsonl", "--tasks", file.replace("logi_qa", "logiqa")]
    with pytest.raises(MegapruneError, match=reason):
        run([*words, "--task-path", str(tmp_path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(
            ["--tasks", "capitols", "--task-path", "tasks"],
            "--tasks capitols: lm_eval has no such task, and tasks has neither a task file nor data for it",
            marks=pytest.mark.slow,
        ),
        (["--tasks", "capitals", "--task-path", "gone"], "--task-path gone: no such folder"),
        (["--tasks", "capitals,geography", "--task-path", "tasks"], "capitals is named twice"),
        (["--task-path", "tasks"], "nothing to evaluate on: give --data, --tasks or both"),
        (["--data", "d", "--task-path", "tasks"], "--task-path needs --tasks"),
        (["--tasks", "capitals", "--task-path", "tasks", "--task-limit", "0"], "--task-limit 0: give a number of at"),
        (["--tasks", "capitals", "--task-batch-size", "0"], "--task-batch-size 0: give a number of at least 1"),
    ],
)
def test_refusals(own_folder, flags, message):
    with pytest.raises(UsageError, match=message):
        run(["--hf-model", "model", *flags])


def test_score_of_a_task_and_the_mean():
    both = {"acc,none": 0.5, "acc_norm,none": 0.6, "acc_norm_stderr,none": 0.03}
    assert headline(both) == (0.6, 0.03)
    assert headline({"perplexity,none": 9.0, "alias": "x"}) is None
    strict = {
        "exact_match,strict-match": 0.2,
        "exact_match_stderr,strict-match": 0.04,
        "exact_match,flexible-extract": 1.0,
    }
    assert headline(strict) == (0.2, 0.04)
    assert mean_score({"a": both, "b": strict, "c": {}}) == {
        "score": pytest.approx(0.4),
        "stderr": pytest.approx(0.025),
    }
    assert mean_score({"c": {}}) is None
