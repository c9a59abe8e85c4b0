"""The Python API, called as a user would call it: reports equal to the commands', errors raised, nothing printed."""

import json
import logging
import subprocess
import sys

import pytest
import torch

import megaprune
from megaprune.cli import main as cli
from megaprune.mcore import parallel
from tests.helpers import tiny
from tests.helpers.converting import assert_same_model


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3_tied")


@pytest.fixture
def flags(model, tiny_data):
    """A short run's flags as keywords."""
    return dict(
        hf_model=model,
        train_data=[tiny_data / "train.jsonl"],
        valid_data=[tiny_data / "valid.jsonl"],
        method="kl-init",
        num_layers_to_prune=2,
        train_iters=2,
        calibration_samples=4,
        seq_length=tiny.SEQ_LENGTH,
        micro_batch_size=2,
        global_batch_size=4,
        lr=1e-3,
    )


def words(flags):
    """The same on a command line."""
    argv = []
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def command(verb, flags):
    assert cli.attempt(verb, words(flags)) == (0, None)


def untimed(report):
    return report | {"stages": {name: stage["tokens"] for name, stage in report["stages"].items()}}


def test_the_import_is_quick_and_loads_no_torch():
    script = (
        "import sys, time; start = time.perf_counter(); import megaprune; took = time.perf_counter() - start\n"
        "heavy = {'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules)\n"
        "assert 'prune' in dir(megaprune) and callable(megaprune.selection.register), dir(megaprune)\n"
        "print(took, sorted(heavy), 'torch' in sys.modules, issubclass(megaprune.UsageError, megaprune.MegapruneError))"
    )
    environment = tiny.environment()
    ran = [
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert all(done.stdout.split(" ", 1)[1] == "[] False True\n" for done in ran)
    assert min(float(done.stdout.split()[0]) for done in ran) < 0.3


def test_unknown_names_are_refused_as_of_any_module():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        megaprune.prunes  # noqa: B018


def test_prune_equals_the_command(flags, tmp_path, capfd):
    report = megaprune.prune(**flags, save=tmp_path / "api" / "run")
    again = megaprune.prune(**flags, save=tmp_path / "api" / "run")
    assert capfd.readouterr().out == ""
    assert report == again
    assert report.to_dict() == json.loads((tmp_path / "api" / "run" / "report.json").read_text())
    command("prune", flags | {"save": tmp_path / "command" / "run"})
    assert "kept layers" in capfd.readouterr().out
    for name in ("api", "command"):
        assert (tmp_path / name / "run" / "plots" / "loss.png").stat().st_size > 1000
    by_command = json.loads((tmp_path / "command" / "run" / "report.json").read_text())
    assert untimed(report.to_dict()) == untimed(by_command)
    assert_same_model(tmp_path / "api" / "run" / "hf", tmp_path / "command" / "run" / "hf")
    assert "megaprune.prune(hf_model=" in (tmp_path / "api" / "run" / "hf" / "README.md").read_text()


def test_a_config_and_flags_that_replace_its_own(flags, tmp_path, caplog, capfd):
    config = megaprune.Config.from_mapping(flags | {"save": tmp_path / "run"})
    with caplog.at_level(logging.INFO, logger="megaprune"):
        assert megaprune.prune(config, dry_run=True) is None
        assert megaprune.prune(config, dry_run=True, prune_ratio=0.6, method="random") is None
    first, second = (record.getMessage() for record in caplog.records)
    assert "pruning    kl-init: 7 layers -> 5 layers" in first
    assert "pruning    random: 7 layers -> 3 layers" in second
    assert capfd.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_is_raised_and_the_next_call_works(flags, tmp_path):
    save = tmp_path / "run"
    with pytest.raises(megaprune.UsageError, match="num_layer_to_prune"):
        megaprune.prune(**flags, num_layer_to_prune=2, save=save)
    with pytest.raises(megaprune.UsageError, match="--save is required"):
        megaprune.prune(**flags)
    with pytest.raises(megaprune.MegapruneError, match="nowhere.jsonl"):
        megaprune.prune(**flags | {"valid_data": [tmp_path / "nowhere.jsonl"]}, save=save)
    assert not save.exists()
    few = {
        "method": "manual",
        "prune_layers": [2, 4],
        "train_iters": 0,
        "num_layers_to_prune": None,
        "valid_data": None,
    }
    assert megaprune.prune(**flags | few, save=save).pruned_layers == [2, 4]


def test_megatrons_groups_of_others_are_left_alone(flags, tmp_path):
    parallel.initialize(parallel.ParallelSizes())
    try:
        with pytest.raises(megaprune.MegapruneError, match="uses Megatron-Core's parallel groups already"):
            megaprune.prune(**flags, save=tmp_path / "run")
    finally:
        parallel.finish()
    own = torch.distributed.new_group()
    assert megaprune.prune(**flags, save=tmp_path / "run", dry_run=True) is None
    torch.distributed.barrier(own)
    torch.distributed.destroy_process_group(own)


def test_a_run_that_is_stopped_goes_on(flags, tmp_path):
    whole = megaprune.prune(**flags, save=tmp_path / "whole")
    with pytest.raises(megaprune.RunStopped):
        megaprune.prune(**flags, save=tmp_path / "stopped", should_stop=tiny.stop_after(1))
    assert (tmp_path / "stopped" / "checkpoints").exists()
    stopped = megaprune.prune(**flags, save=tmp_path / "stopped", should_stop=lambda: False)
    assert untimed(stopped.to_dict()) == untimed(whole.to_dict())
    assert_same_model(tmp_path / "stopped" / "hf", tmp_path / "whole" / "hf")


def test_score_layers_equals_a_run_and_writes_nothing(flags, model, tiny_data, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for folder in (model, tiny_data) for path in folder.rglob("*")}
    data, common = flags["train_data"], {name: flags[name] for name in ("seq_length", "calibration_samples")}
    scores = megaprune.score_layers(hf_model=model, data=data, **common)
    sized = megaprune.score_layers(hf_model=model, data=data, method="sleb", num_layers_to_prune=2, **common)
    with pytest.raises(megaprune.UsageError, match="sleb selects layers together"):
        megaprune.score_layers(hf_model=model, data=data, method="sleb", **common)
    assert capfd.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for folder in (model, tiny_data) for path in folder.rglob("*")} == before
    assert scores.kept_layers is None and sized.scores is None and sized.tokens > 0
    untrained = {name: value for name, value in flags.items() if name != "valid_data"} | {"train_iters": 0}
    for method, found in {"kl-init": scores, "sleb": sized}.items():
        run = megaprune.prune(**untrained | {"method": method}, save=tmp_path / method)
        assert run.scores == found.to_dict()["scores"]
        assert found.kept_layers in (None, run.kept_layers)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"method": "e3"}, "--method e3 does not score layers on calibration data: choose one of auto, clp"),
        ({"save": "run"}, "score_layers does not take save"),
        ({"data": []}, "data is required"),
        ({"hf_model": None}, "--hf-model is required"),
        ({"seq_length": 0}, "--seq-length 0 is less than 1"),
    ],
)
def test_score_layers_refuses(model, tiny_data, wrong, said):
    with pytest.raises(megaprune.UsageError, match=said):
        megaprune.score_layers(**{"hf_model": model, "data": [tiny_data / "train.jsonl"]} | wrong)


def test_remove_layers_equals_the_command_and_joins_no_processes(model, tmp_path, monkeypatch, capfd):
    common = {"hf_model": model, "method": "manual", "train_iters": 0, "seq_length": tiny.SEQ_LENGTH}
    command("prune", common | {"prune_layers": "1,4", "save": tmp_path / "run"})
    capfd.readouterr()

    def refused(*args, **kwargs):
        raise AssertionError("a process group")

    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    report = megaprune.remove_layers(model, layers=[4, 1], save=tmp_path / "out", max_shard_size="100KB")
    assert capfd.readouterr().out == ""
    assert_same_model(tmp_path / "out", tmp_path / "run" / "hf")
    by_command = json.loads((tmp_path / "run" / "report.json").read_text())
    others = {"stages", "seq_length"}
    assert {k: v for k, v in report.to_dict().items() if k not in others} == {
        k: v for k, v in by_command.items() if k not in others
    }
    tiny.load_hf(tmp_path / "out")
    assert "megaprune.remove_layers(hf_model=" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(megaprune.MegapruneError, match="out exists: choose another folder"):
        megaprune.remove_layers(model, layers=[1], save=tmp_path / "out")
    with pytest.raises(megaprune.UsageError, match="there is no layer 7"):
        megaprune.remove_layers(model, layers=[7], save=tmp_path / "other")
    with pytest.raises(megaprune.UsageError, match="--max-shard-size"):
        megaprune.remove_layers(model, layers=[1], save=tmp_path / "other", max_shard_size="5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_remove_layers_imports_no_megatron(model, tmp_path):
    script = (
        "import sys, megaprune; megaprune.remove_layers(sys.argv[1], layers=[1], save=sys.argv[2])\n"
        "import torch; assert not torch.distributed.is_initialized()\n"
        "assert not any(name.startswith('megatron') for name in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(model), str(tmp_path / "out")],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "out" / "config.json").is_file()


def test_evaluate_equals_the_command(model, tiny_data, tmp_path, capfd):
    given = {"hf_model": model, "data": [tiny_data / "valid.jsonl"], "teacher": model, "limit": 3}
    found = megaprune.evaluate(**given, seq_length=tiny.SEQ_LENGTH)
    assert capfd.readouterr().out == ""
    command("evaluate", given | {"seq_length": tiny.SEQ_LENGTH, "output": tmp_path / "found.json"})
    assert found.to_dict() == json.loads((tmp_path / "found.json").read_text())
    assert found.kl == pytest.approx(0, abs=1e-6) and found.tasks is None
    with pytest.raises(megaprune.UsageError, match="nothing to evaluate on"):
        megaprune.evaluate(model)
    with pytest.raises(megaprune.UsageError, match="output"):
        megaprune.evaluate(model, given["data"], output=tmp_path / "other.json")


def test_import_and_export_equal_the_command(model, tmp_path, capfd):
    imported = megaprune.import_hf(model, tmp_path / "megatron", workers=1)
    exported = megaprune.export_hf(megatron_path=tmp_path / "megatron", hf_path=tmp_path / "hf", max_shard_size="1MB")
    assert capfd.readouterr().out == ""
    assert_same_model(tmp_path / "hf", model)
    number = len(tiny.read_tensors(model))
    assert imported.to_dict() == {"tensors": number, "source": str(model), "output": str(tmp_path / "megatron")}
    assert exported.tensors == number
    argv = ["import", *words({"hf_model": model, "megatron_path": tmp_path / "other"})]
    assert cli.attempt("convert", argv) == (0, None)
    assert capfd.readouterr().out == f"imported {number:,} tensors of {model} into {tmp_path / 'other'}\n"
    with pytest.raises(megaprune.UsageError, match="--dtype int8"):
        megaprune.import_hf(model, tmp_path / "again", dtype="int8")
    with pytest.raises(megaprune.UsageError, match="--workers 0"):
        megaprune.export_hf(tmp_path / "megatron", tmp_path / "again", workers=0)
    with pytest.raises(megaprune.UsageError, match="megatron"):
        megaprune.import_hf(model, tmp_path / "megatron")
    report = megaprune.prune(
        load=tmp_path / "megatron",
        method="manual",
        prune_layers=[3],
        train_iters=0,
        save=tmp_path / "run",
        seq_length=8,
    )
    assert report.kept_layers == [0, 1, 2, 4, 5, 6]
