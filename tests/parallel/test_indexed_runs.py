"""A run on blended preprocessed data is the same at every layout, stopped or not."""

import json
import signal

import pytest
import torch

from megaprune.cli import main as cli
from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.helpers.launch import launch_cases

_TP2 = ("--tensor-model-parallel-size", "2")
LAYOUTS = {"dp2": (), "pp2": ("--pipeline-model-parallel-size", "2")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("indexed-runs")


@pytest.fixture(scope="module")
def argv(tiny_model, tiny_data, folder):
    """Return a function that gives the flags of a short E3 run on a blend of two datasets, with several epochs of the
    smaller.
    """
    model, before = tiny_model("qwen3_tied"), signal.getsignal(signal.SIGTERM)
    for name in ("train", "valid"):
        words = ["--input", tiny_data / f"{name}.jsonl", "--tokenizer", model, "--output-prefix", folder / name]
        assert cli.attempt("preprocess-data", [*map(str, words), "--workers", "1"]) == (0, None)
    signal.signal(signal.SIGTERM, before)

    def get(name, *flags):
        argv = tiny.prune_argv(model, tiny_data, folder / name, *flags)
        for flag, words in {
            "--train-data": ["0.7", str(folder / "train"), "0.3", str(folder / "valid")],
            "--valid-data": [str(folder / "valid")],
        }.items():
            at = argv.index(flag)
            argv[at + 1 : at + 2] = words
        return [*argv, "--train-iters", "8", "--search-iters", "4", "--save-interval", "3"]

    return get


@pytest.fixture(scope="module")
def alone(argv, folder):
    tiny.run_here(argv("alone"))
    return folder / "alone"


@pytest.fixture(scope="module")
def at_two(argv, folder):
    """Runs on two processes, in one launch."""
    cases = {name: dict(kind="prune", argv=argv(name, *flags)) for name, flags in LAYOUTS.items()}
    stops = [(argv("resumed", *_TP2), 3), (argv("resumed"), None)]
    return launch_cases(2, cases | {"resumed": dict(kind="interrupted_prune", stops=stops)}, folder)


@pytest.mark.parametrize("name", [*LAYOUTS, "resumed"])
def test_run_is_the_same(name, alone, at_two):
    run = at_two.path(name)
    found, wanted = (json.loads((path / "report.json").read_text()) for path in (run, alone))
    assert found["kept_layers"] == wanted["kept_layers"]
    records, expected = read_metrics(run), read_metrics(alone)
    assert len(records) == len(expected) == 8
    for record, other in zip(records, expected, strict=True):
        for key in ("loss", "grad_norm"):
            # the first step distills the original model from itself, so its loss is rounding noise
            assert record[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), (key, record["iteration"])
    tensors = tiny.read_tensors(run / "hf")
    for tensor, weight in tiny.read_tensors(alone / "hf").items():
        torch.testing.assert_close(tensors[tensor], weight, atol=2e-3, rtol=1e-3, msg=tensor)


def test_nothing_half_built_is_left(at_two):
    at_two.check(*LAYOUTS, "resumed")
    assert not list(at_two.folder.rglob("*.tmp"))
    assert len(list((at_two.path("dp2") / "data-cache" / "indexed").iterdir())) == 2  # training and calibration
