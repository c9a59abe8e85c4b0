"""Comparisons: the recipe, the runs that follow from it, and the tables."""

import csv
import json
import math
import shutil

import pytest
import yaml

from megaprune.cli import main as cli
from megaprune.comparison.grid import TaskSettings, read_comparison
from megaprune.comparison.ranking import Ranking
from megaprune.comparison.table import rows_of, write_runs, write_tables
from megaprune.utils.errors import UsageError
from tests.helpers import tiny
from tests.helpers.benchmarks import write_benchmarks

COMMON = {"hf_model": "m", "train_data": ["d", "e"], "train_iters": 10, "bf16": True}
ASKED = {"run": COMMON, "methods": ["e3", "random"], "num_layers_to_prune": [2, 3], "seeds": [1, 2]}


def write(folder, **changes):
    asked = {key: value for key, value in (ASKED | changes).items() if value is not None}
    (folder / "c.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return folder / "c.yaml"


def test_a_run_for_each_method_size_and_seed(tmp_path):
    runs = read_comparison(write(tmp_path), tmp_path / "save").runs
    assert [run.folder.name for run in runs[:3]] == ["e3-2-seed1", "e3-2-seed2", "e3-3-seed1"] and len(runs) == 8
    flat = [run.config.flat() for run in runs]
    different = {key for key in flat[0] if len({str(settings[key]) for settings in flat}) > 1}
    assert different == {"method", "num_layers_to_prune", "seed", "save"}
    assert flat[0]["train_data"] == ["d", "e"] and flat[0]["bf16"] is True


def test_methods_may_have_flags_and_labels_of_their_own(tmp_path):
    methods = [
        "clp",
        {"method": "e3", "search_preset": "paper", "mask_lr": 0.5, "label": "fast"},
        {"method": "clp", "recovery_layers": "endpoints", "label": "ends"},
    ]
    runs = read_comparison(write(tmp_path, methods=methods, seeds=[1], num_layers_to_prune=[2]), tmp_path).runs
    assert [run.label for run in runs] == ["clp", "fast", "ends"]
    assert [run.config.tunes_endpoints for run in runs] == [False, False, True]
    assert runs[1].config.search.mask_lr == 0.5


def test_layers_named_by_the_user_are_a_method_too(tmp_path):
    named = [{"method": "manual", "prune_layers": "2,5", "label": "mine"}, {"method": "random", "seeds": [1]}]
    run = COMMON | {"protect_layers": ["first", "last"]}
    runs = read_comparison(write(tmp_path, run=run, methods=named, num_layers_to_prune=[2, 3]), tmp_path).runs
    assert [run.folder.name for run in runs] == ["mine-2-seed1", "mine-2-seed2", "random-2-seed1", "random-3-seed1"]
    assert runs[0].config.prune.prune_layers == "2,5" and runs[0].config.prune.num_layers_to_prune is None
    assert runs[0].config.search.protect_layers == "first,last"


def test_several_models_and_seeds_of_a_methods_own(tmp_path):
    models = {"small": {"hf_model": "a"}, "large": {"hf_model": "b", "bf16": False}}
    methods = ["e3", {"method": "shortgpt", "seeds": [7]}]
    runs = read_comparison(write(tmp_path, models=models, methods=methods, num_layers_to_prune=[2]), tmp_path).runs
    names = [f"{model}-{run}" for model in models for run in ("e3-2-seed1", "e3-2-seed2", "shortgpt-2-seed7")]
    assert [run.folder.name for run in runs] == names
    assert [run.config.model.hf_model for run in runs] == ["a"] * 3 + ["b"] * 3
    assert {(run.model, run.size, run.config.recovery.bf16) for run in runs} == {
        ("small", 2, True),
        ("large", 2, False),
    }


def test_each_method_runs_with_each_lever(tmp_path):
    methods = ["random", {"method": "clp", "label": "near", "train-iters": 5}]
    levers = {"base": None, "long": {"train_iters": 20}, "hot": {"lr": 0.5}}
    asked = write(tmp_path, methods=methods, levers=levers, seeds=[1, 2], num_layers_to_prune=[2, 3])
    runs = read_comparison(asked, tmp_path).runs
    assert len(runs) == 2 * 3 * 2 * 2
    assert list(dict.fromkeys(run.label for run in runs)) == [
        f"{method}-{lever}" for method in ("random", "near") for lever in levers
    ]
    iters = {run.label: run.config.recovery.train_iters for run in runs}
    assert iters == dict(zip(iters, [10, 20, 10, 5, 20, 5], strict=True))
    assert {run.label for run in runs if run.config.recovery.lr == 0.5} == {"random-hot", "near-hot"}
    assert [run.folder.name for run in runs[:5:2]] == [
        "random-base-2-seed1",
        "random-base-3-seed1",
        "random-long-2-seed1",
    ]


def test_tasks_are_read(tmp_path):
    assert read_comparison(write(tmp_path), tmp_path).tasks is None
    asked = write(tmp_path, tasks="piqa, copa", task_path="d", task_limit=9, task_pruned=True, dtype="bf16")
    comparison = read_comparison(asked, tmp_path)
    assert comparison.tasks == TaskSettings(("piqa", "copa"), path="d", limit=9, pruned=True, dtype="bf16")
    assert comparison.dtype == "bf16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"levers": {"a": {"method": "e3"}}}, "method is not allowed under 'levers'"),
        ({"levers": {"a": {"seed": 1}}}, "seed is not allowed under 'levers'"),
        ({"levers": ["lr"]}, "levers must map labels to flags"),
        ({"levers": {"a/b": {}}}, "the lever 'a/b' can't be part of a folder's name"),
        ({"levers": {"a": {"lrr": 1}}}, "e3-a: unknown key 'lrr'"),
        ({"tasks": []}, "tasks must be a list of names"),
        ({"task_limit": 3}, "task_limit needs tasks"),
        ({"tasks": ["copa"], "task_limit": 0}, "task_limit must be a number of at least 1"),
        ({"tasks": ["copa"], "task_pruned": "yes"}, "task_pruned must be true or false"),
        ({"dtype": "fp8"}, "dtype must be one of auto, fp32, bf16, fp16"),
        ({"run": None}, "key 'run'"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"methods": "e3"}, "methods must be a list"),
        ({"seeds": None}, "seeds must be a list"),
        ({"num_layers_to_prune": None}, "num_layers_to_prune, prune_ratio"),
        ({"prune_ratio": [0.5]}, "give one of"),
        ({"methods": ["e3", "e3"]}, "appears twice"),
        ({"methods": ["magic"]}, "magic"),
        ({"run": COMMON | {"lr": -1}}, "--lr"),
        ({"models": ["a"]}, "models must map names to flags"),
        ({"methods": [{"method": "e3", "seeds": 3}]}, "seeds must be a list"),
        ({"rank_windows": "all"}, "rank_windows must be a number"),
        ({"rank_windows": 4}, "rank_windows needs valid_data"),
        ({"rank_windows": True}, "rank_windows must be a number"),
        ({"methods": [["random"]]}, "'random'.* is not a method"),
        ({"methods": [{"label": "foo"}]}, "'foo'.* is not a method"),
        ({"methods": [{"method": "random", "label": "a/b"}]}, "label 'a/b' can't be part of a folder's name"),
        ({"models": {"..": {"hf_model": "a"}}}, r"model '\.\.' can't be part"),
        ({"run": COMMON | {"seed": 3}}, "seed is not allowed under 'run'"),
        ({"run": COMMON | {"dry-run": True}}, "dry-run is not allowed under 'run'"),
        ({"methods": ["manual"]}, "--prune-layers '' is not a list"),
    ],
)
def test_bad_files(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        read_comparison(write(tmp_path, **changes), tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        read_comparison(tmp_path / "none.yaml", tmp_path)


def result(label, seed, pruned, loss):
    return {
        "model": "",
        "label": label,
        "size": 2,
        "name": f"{label}-2-seed{seed}",
        "kept_layers": [layer for layer in range(6) if layer not in pruned],
        "pruned_layers": pruned,
        "tokens_seen": 1000,
        "stages": {"importance": {"seconds": 1.0, "tokens": 50}, "recovery": {"seconds": 2.0, "tokens": 1000}},
        "valid": {"teacher": {"loss": 2.0}, "pruned": {"loss": loss + 1}, "recovered": {"loss": loss}},
        "kl": 0.5,
        "top1_agreement": 0.75,
        "mask_kl": math.nan,
        "percentile": math.nan,
    }


def test_rows_are_means_over_seeds(tmp_path):
    results = [result("a", 1, [1, 2], 3.0), result("a", 2, [2, 3], 4.0), result("b", 1, [1, 2], 2.5)]
    rows = rows_of(results)
    assert [row["label"] for row in rows] == ["a", "b"]
    assert (rows[0]["recovered_loss"], rows[0]["pruned_loss"], rows[0]["seeds"]) == (3.5, 4.5, 2)
    assert rows[0]["jaccard"] == pytest.approx(1 / 3) and rows[0]["spread"] == pytest.approx(0.5**0.5)
    assert math.isnan(rows[1]["jaccard"]) and rows[1]["selection_tokens"] == 50
    # of the means: 1 of 2.5 nats that pruning cost
    assert rows[0]["loss_share"] == pytest.approx(1 / 2.5) and rows[0]["selection_share"] == pytest.approx(1 / 3)
    free = result("c", 1, [1], 1.0)  # pruned and recovered are both at or below the teacher
    assert math.isnan(rows_of([free])[0]["loss_share"])
    unmeasured = [one | {"valid": {}} for one in results[:2]]
    assert math.isnan(rows_of(unmeasured)[0]["spread"])
    write_tables(rows, tmp_path)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[4].startswith(
        "| b | 2 | 1 | 3.5000 | 2.5000 | – | 66.7% | 0.5000 | 75.0% | 1,000 | 50 | 3 | 33.3% | – |"
    )
    assert table[5].startswith("| a | 2 | 2 |")
    with (tmp_path / "table.csv").open() as file:
        assert [row["recovered_loss"] for row in csv.DictReader(file)] == ["3.5", "2.5"]


def test_sizes_keep_their_type_beside_others(tmp_path):
    results = [result("a", 1, [1, 2], 3.0) | {"size": 0.25}, result("m", 1, [1, 2], 3.0) | {"size": 2}]
    write_tables(rows_of(results), tmp_path)
    write_runs([one | {"seed": 1} for one in results], tmp_path)
    for name in ("table.csv", "runs.csv"):
        with (tmp_path / name).open() as file:
            assert [row["size"] for row in csv.DictReader(file)] == ["0.25", "2"]


def test_ranks_and_models_are_shown_where_there_are_any(tmp_path):
    ranked = {"mask_kl": 0.25, "percentile": 12.5}
    results = [result("a", 1, [1, 2], 3.0) | {"model": "big"} | ranked, result("a", 1, [1, 2], 3.0)]
    write_tables(rows_of(results), tmp_path)
    parts = (tmp_path / "table.md").read_text().split("Teacher")
    assert parts[0] == "### big\n\n" and "| 0.2500 | 12.5 |" in parts[1] and "percentile" not in parts[2]


def test_a_mask_is_ranked_among_all():
    ranking = Ranking({(0, 1): 0.5, (0, 2): 0.1, (1, 2): 0.3, (0, 3): 0.3})
    assert [ranking.percentile(kept) for kept in ([0, 2], [1, 2], [0, 3], [0, 1])] == [0.0, 25.0, 25.0, 75.0]
    assert math.isnan(ranking.percentile([2, 3]))


def scored(label, seed, recovered, pruned=0.4):
    """Return a result with scores of two tasks, the second of them without change."""

    def metrics(first):
        return {"a": {"acc,none": first, "acc_stderr,none": 0.06}, "b": {"acc,none": 0.5, "acc_stderr,none": 0.08}}

    models = {"teacher": metrics(0.8)} | ({} if pruned is None else {"pruned": metrics(pruned)})
    return result(label, seed, [1, 2], 3.0) | {"tasks": models | {"recovered": metrics(recovered)}}


def test_scores_of_tasks_stand_beside_the_share_recovered(tmp_path):
    rows = rows_of([scored("x", 1, 0.5), scored("x", 2, 0.6), scored("y", 1, 0.3)])
    write_tables(rows, tmp_path)
    _, tasks = (tmp_path / "table.md").read_text().split("Scores of tasks ")
    assert tasks.splitlines()[2:] == [
        "| method | layers pruned | a | b | mean | ± |",
        "| --- | --- | --- | --- | --- | --- |",
        "| teacher | 0 | 0.8000 | 0.5000 | 0.6500 | 0.0500 |",
        "| x | 2 | 0.4000 → 0.5500 (38%) | 0.5000 → 0.5000 | 0.4500 → 0.5250 (38%) | 0.0500 |",
        "| y | 2 | 0.4000 → 0.3000 (-25%) | 0.5000 → 0.5000 | 0.4500 → 0.4000 (-25%) | 0.0500 |",
    ]
    with (tmp_path / "table.csv").open() as file:
        row = next(csv.DictReader(file))
    assert float(row["task a share"]) == pytest.approx(0.375) and row["task b share"] == "nan"
    assert float(row["task mean recovered"]) == pytest.approx(0.525)
    assert float(row["task a recovered stderr"]) == pytest.approx(0.06)


def test_without_scores_before_recovery_there_is_no_share(tmp_path):
    write_tables(rows_of([scored("x", 1, 0.5, pruned=None)]), tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| x | 2 | 0.5000 | 0.5000 | 0.5000 | 0.0500 |" in text and "Scores of tasks after recovery" in text


@pytest.mark.slow
def test_a_comparison_from_end_to_end(tiny_model, tiny_data, tmp_path, capfd):
    run = {
        "hf_model": str(tiny_model("qwen3_tied")),
        "train_data": str(tiny_data / "train.jsonl"),
        "valid_data": str(tiny_data / "valid.jsonl"),
        "seq_length": tiny.SEQ_LENGTH,
        "micro_batch_size": 2,
        "train_iters": 4,
        "calibration_samples": 2,
    }
    asked = write(
        tmp_path,
        run=run,
        methods=["e3", "shortgpt", "random"],
        seeds=[1],
        num_layers_to_prune=[2],
        rank_windows=4,
        tasks=["arc_easy", "copa"],
        task_path=str(write_benchmarks(tmp_path / "benchmarks")),
        task_limit=2,
        task_pruned=True,
    )
    save = tmp_path / "out"
    words = ["--config", str(asked), "--save", str(save)]
    assert cli.attempt("compare", words) == (0, None)
    made = {path.name for path in save.iterdir()}
    masks = "masks-2-first+last-4windows.json"
    assert made == {"runs", "table.csv", "table.md", "runs.csv", "quality.png", "recovery.png", "tasks", masks}
    with (save / "runs.csv").open() as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["e3", "shortgpt", "random"]
    with (save / "table.csv").open() as file:
        rows = {row["label"]: row for row in csv.DictReader(file)}
    assert {row["tokens"] for row in rows.values()} == {"256"}
    for label, row in rows.items():
        report = json.loads((save / "runs" / f"{label}-2-seed1" / "report.json").read_text())
        assert float(row["recovered_loss"]) == report["valid"]["recovered"]["loss"]
        card = (save / "runs" / f"{label}-2-seed1" / "hf" / "README.md").read_text()
        assert "megaprune.prune(" in card and str(tmp_path) not in card
        assert (f"method='{label}'" in card) == (label != "e3")  # the default is not written
        ranked = json.loads((save / masks).read_text())
        kl = ranked[" ".join(map(str, report["kept_layers"]))]
        assert len(ranked) == math.comb(5, 3) and float(row["mask_kl"]) == kl
        assert float(row["percentile"]) == 100 * sum(other < kl for other in ranked.values()) / len(ranked)
        assert float(row["kl"]) > 0 and 0 <= float(row["top1_agreement"]) <= 1
        scores = json.loads((save / "runs" / f"{label}-2-seed1" / "tasks.json").read_text())["tasks"]
        before = save / "tasks" / f"pruned-{'+'.join(map(str, report['pruned_layers']))}.json"
        for name, file in (("recovered", scores), ("pruned", json.loads(before.read_text())["tasks"])):
            assert file["copa"]["copa"]["items"] == 2
            assert float(row[f"task copa {name}"]) == file["copa"]["copa"]["acc,none"]
    assert len(list((save / "tasks").glob("pruned-*"))) == len({row["kept"] for row in rows.values()})
    assert (save / "tasks" / "teacher.json").is_file() and "| teacher | 0 |" in (save / "table.md").read_text()
    # scores that are there are read; a task that is new is measured alone
    stored = json.loads((save / "tasks" / "teacher.json").read_text())
    stored["tasks"]["copa"]["copa"]["acc,none"] = 0.123
    del stored["tasks"]["arc_easy"]
    (save / "tasks" / "teacher.json").write_text(json.dumps(stored))
    # again: finished runs stay as they are, a lost one is made anew, and comes out the same
    shutil.rmtree(save / "runs" / "random-2-seed1")
    assert cli.attempt("compare", words) == (0, None)
    assert capfd.readouterr().out.count("holds the finished run already") == 2
    with (save / "table.csv").open() as file:
        again = {row["label"]: row for row in csv.DictReader(file)}
    changed = {"seconds": 0, "selection_share": 0, "task mean teacher": 0, "task mean share": 0, "task copa teacher": 0}
    for label, row in rows.items():
        assert again[label]["task copa teacher"] == "0.123"
        assert again[label] | changed | {"task copa share": 0} == row | changed | {"task copa share": 0}


def test_all_runs_are_validated_before_the_first_one(tiny_model, tiny_data, tmp_path):
    run = {"hf_model": str(tiny_model("qwen3_tied")), "train_data": str(tiny_data / "train.jsonl"), "train_iters": 1}
    run |= {"seq_length": tiny.SEQ_LENGTH, "valid_data": str(tiny_data / "valid.jsonl"), "global_batch_size": 1}
    for changes, said in [
        ({"methods": ["random", "shortened"]}, "shortened-2-seed1: --method shortened keeps the first 4"),
        ({"num_layers_to_prune": [2, 6]}, "random-6-seed1: --num-layers-to-prune"),
        (
            {"num_layers_to_prune": None, "target_params": [150_000], "rank_windows": 1},
            "random-150000-seed1: rank_windows: masks are ranked by number of layers",
        ),
    ]:
        asked = write(tmp_path, **({"run": run, "methods": ["random"], "num_layers_to_prune": [2]} | changes))
        status, error = cli.attempt("compare", ["--config", str(asked), "--save", str(tmp_path / "out")])
        assert status and said in str(error) and not (tmp_path / "out").exists()
