"""Bad input: the error is one line that names the cause, and no file changes."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import tiny
from tests.helpers.checkpoints import layers_in_config
from tests.helpers.launch import torchrun

# All but one use the outcomes of one process that runs every case.
pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("bad_input_worker.py")
PRUNE = Path(__file__).parents[2] / "tools" / "prune.py"


class Workshop:
    """Maker of bad inputs, each under its own name."""

    def __init__(self, model, sharded, data, folder):
        self.model, self.sharded, self.data, self.folder = model, sharded, data, folder

    def file(self, name, body=""):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body if isinstance(body, bytes) else body.encode())
        return path

    def copy(self, name, sharded=False):
        return Path(shutil.copytree(self.sharded if sharded else self.model, self.folder / name))

    def model_without(self, name, pattern, sharded=False):
        folder = self.copy(name, sharded)
        sorted(folder.glob(pattern))[0].unlink()
        return folder

    def model_with_config(self, name, **edits):
        folder = self.copy(name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | edits))
        return folder

    def model_with_tensor(self, name, tensor, edit):
        folder = self.copy(name)
        tensors = load_file(folder / "model.safetensors")
        tensors[tensor] = edit(tensors[tensor]).contiguous()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def model_with_file(self, name, file, body, sharded=False):
        folder = self.copy(name, sharded)
        path = sorted(folder.glob(file))[0]
        path.write_bytes(body(path.read_bytes()))
        return folder

    def run_of(self, name, settings):
        return self.file(f"saves/{name}/run/run.json", settings).parent


@dataclass
class Case:
    """A command line that must be refused, or with status 0 accepted."""

    said: tuple[str, ...]
    status: int
    env: dict[str, str]
    flags: dict[str, object]


def bad(*said, status=1, env=(), **flags):
    """Return the case of a valid run with these flags changed (None removes a flag), and the words of its error."""
    return Case(said, status, dict(env), flags)


def good(**flags):
    return Case((), 0, {}, flags)


def with_value(value):
    """Set one element of a tensor to this number."""

    def edit(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[7] = value
        return tensor

    return edit


# As torchrun's processes have it.
TWO, SIX = ({"TORCHELASTIC_RUN_ID": "a-run", "RANK": "0", "WORLD_SIZE": size} for size in ("2", "6"))
MANUAL = dict(method="manual", num_layers_to_prune=None, search_iters=None)
SURGERY = MANUAL | dict(prune_layers="3,4", train_iters=0, train_data=None)
KEY = "model.layers.3.self_attn.k_proj.weight"

CASES = {
    # the model
    "no model folder": lambda w: bad("--hf-model", "none", "does not exist", hf_model=w.folder / "none"),
    "model is a file": lambda w: bad("--hf-model", "f.bin", "not a folder", hf_model=w.file("f.bin")),
    "hub id that can't be had": lambda w: bad("--hf-model nobody/nothing", hf_model="nobody/nothing"),
    "no config": lambda w: bad("holds no config.json", hf_model=w.model_without("c0", "config.json")),
    "config is no JSON": lambda w: bad(
        "config.json is not valid JSON", hf_model=w.model_with_file("c1", "config.json", lambda b: b[:-9])
    ),
    "unknown family": lambda w: bad(
        "model_type 'gpt2'", "qwen3", hf_model=w.model_with_config("c2", model_type="gpt2")
    ),
    "unsupported activation": lambda w: bad("hidden_act 'gelu'", hf_model=w.model_with_config("c3", hidden_act="gelu")),
    "truncated shard": lambda w: bad(
        "model-00002-of-",
        "damaged or truncated",
        hf_model=w.model_with_file("w0", "model-00002-*", lambda b: b[:-100], sharded=True),
    ),
    "missing shard": lambda w: bad(
        "model-00001-of-", "is missing", hf_model=w.model_without("w1", "model-00001-*", sharded=True)
    ),
    "no weights": lambda w: bad("holds neither model.safetensors", hf_model=w.model_without("w2", "model.safetensors")),
    "config of another model": lambda w: bad(
        "mlp.down_proj.weight is stored as [64, 96], but config.json gives [64, 128]",
        hf_model=w.model_with_config("w3", intermediate_size=128),
    ),
    "more layers in the config": lambda w: bad(
        "lacks model.layers.7.", hf_model=w.model_with_config("w4", **layers_in_config(8))
    ),
    "fewer layers in the config": lambda w: bad(
        "holds model.layers.6.", hf_model=w.model_with_config("w5", **layers_in_config(6))
    ),
    "surgery on weights of another shape": lambda w: bad(
        KEY, "is stored as", hf_model=w.model_with_tensor("w6", KEY, lambda t: t[:-1]), **SURGERY
    ),
    "NaN, E3": lambda w: bad(KEY, "not finite", hf_model=w.model_with_tensor("n0", KEY, with_value(torch.nan))),
    "infinity, recovery": lambda w: bad(
        "model.embed_tokens.weight",
        "not finite",
        hf_model=w.model_with_tensor("n1", "model.embed_tokens.weight", with_value(torch.inf)),
        **MANUAL | dict(prune_layers="3", distill_loss="ce"),
    ),
    "no tokenizer": lambda w: bad("t0 holds no tokenizer", hf_model=w.model_without("t0", "tokenizer.json")),
    "broken tokenizer": lambda w: bad(
        "t1 holds no tokenizer", hf_model=w.model_with_file("t1", "tokenizer.json", lambda b: b[:99])
    ),
    # the data
    "empty data": lambda w: bad("--train-data", "empty.jsonl is empty", status=2, train_data=w.file("empty.jsonl")),
    "malformed JSON": lambda w: bad(
        "--train-data", "bad.jsonl, line 2", train_data=w.file("bad.jsonl", '{"text": "a"}\n{"text": "b"\n')
    ),
    "rows without the key": lambda w: bad(
        "key.jsonl, line 1", "--text-key", train_data=w.file("key.jsonl", '{"body": "a"}\n')
    ),
    "no data": lambda w: bad("--train-data", "none.jsonl", status=2, train_data=w.folder / "none.jsonl"),
    "too little data": lambda w: bad(
        "--train-data", "short.jsonl", "--seq-length", train_data=w.file("short.jsonl", '{"text": "a b"}\n')
    ),
    "folder without data": lambda w: bad(
        "--train-data", "folder", train_data=w.file("folder/notes.xyz", "nothing").parent, status=2
    ),
    "no validation data": lambda w: bad("--valid-data", "gone.jsonl", status=2, valid_data=w.folder / "gone.jsonl"),
    "malformed validation data": lambda w: bad(
        "--valid-data", "v.jsonl, line 1", valid_data=w.file("v.jsonl", "text\n")
    ),
    "more calibration samples than windows": lambda w: bad(
        "--calibration-samples 9999", status=2, calibration_samples=9999
    ),
    "token cache in a file": lambda w: bad("token cache", "cache.txt", data_cache_path=w.file("cache.txt") / "x"),
    # flags and the model
    "two ways to say what to prune": lambda w: bad("--prune-ratio", status=2, prune_ratio=0.5),
    "unknown recipe key": lambda w: bad("unknown key 'layers'", status=2, config=w.file("r.yaml", "layers: 3")),
    "unknown flag": lambda w: bad("--num-layers", status=2, num_layers=3),
    "more layers than are free": lambda w: bad(
        "--num-layers-to-prune", "--protect-layers", status=2, num_layers_to_prune=6
    ),
    "parameters of the whole model": lambda w: bad(
        "--target-params 1,000,000,000", "the model has", status=2, num_layers_to_prune=None, target_params=10**9
    ),
    "fewer parameters than are protected": lambda w: bad(
        "--target-params", "--protect-layers", status=2, num_layers_to_prune=None, target_params=100_000
    ),
    "parameters and a number of layers": lambda w: bad("--target-params", status=2, target_params=100_000),
    "all layers": lambda w: bad("--num-layers-to-prune", "7 of 7", status=2, num_layers_to_prune=7),
    "ratio of no layer": lambda w: bad("--prune-ratio 0.01", status=2, num_layers_to_prune=None, prune_ratio=0.01),
    "layer that is not there": lambda w: bad("no layer 7", status=2, **SURGERY | dict(prune_layers="2,7")),
    "layer twice": lambda w: bad("layer 2 is named twice", status=2, **SURGERY | dict(prune_layers="2,2")),
    "protected layer that is not there": lambda w: bad("--protect-layers", status=2, protect_layers="first,9"),
    "window longer than the positions": lambda w: bad("--seq-length 512", "256", status=2, seq_length=512),
    "top k beyond the vocabulary": lambda w: bad("--distill-top-k 332", "331", status=2, distill_top_k=332),
    "batch that is no multiple": lambda w: bad(
        "--global-batch-size 3", status=2, global_batch_size=3, micro_batch_size=2
    ),
    "file size": lambda w: bad("--max-shard-size 'big'", status=2, max_shard_size="big"),
    "no Transformer Engine": lambda w: bad("--transformer-impl", status=2, transformer_impl="transformer_engine"),
    "no W&B": lambda w: bad("--wandb-project", wandb_project="p"),
    "TensorBoard in a file": lambda w: bad("--tensorboard-dir", "board.txt", tensorboard_dir=w.file("board.txt") / "x"),
    # processes
    "TP does not divide the heads": lambda w: bad(
        "--tensor-model-parallel-size 3", "heads", status=2, env=TWO | {"WORLD_SIZE": "3"}, tensor_model_parallel_size=3
    ),
    "processes do not fit": lambda w: bad(
        "6 processes",
        "--tensor-model-parallel-size 2",
        status=2,
        env=SIX,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
    ),
    "one process": lambda w: bad(
        "1 processes", "--pipeline-model-parallel-size 2", status=2, pipeline_model_parallel_size=2
    ),
    "sequence parallelism alone": lambda w: bad("--sequence-parallel", status=2, sequence_parallel=True),
    "sequence that can't be split": lambda w: bad(
        "--seq-length 33", status=2, env=TWO, sequence_parallel=True, tensor_model_parallel_size=2, seq_length=33
    ),
    "stages without layers": lambda w: bad(
        "--pipeline-model-parallel-size 6", status=2, env=SIX, pipeline_model_parallel_size=6
    ),
    "layout that is none": lambda w: bad(
        "--pipeline-model-parallel-layout 'E3x|L'",
        status=2,
        env=TWO,
        pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout="E3x|L",
    ),
    "layout of other layers": lambda w: bad(
        "--pipeline-model-parallel-layout",
        status=2,
        env=TWO,
        pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout="Ettt|tttL",
    ),
    "layout of other stages": lambda w: bad(
        "--pipeline-model-parallel-layout",
        status=2,
        env=TWO,
        pipeline_model_parallel_size=2,
        pipeline_model_parallel_layout="Etttt|tt|tL",
    ),
    "context parallelism": lambda w: bad("--context-parallel-size", status=2, env=TWO, context_parallel_size=2),
    # the run folder
    "save is a file": lambda w: bad("--save", "is a file", save=w.file("saves/file/run")),
    "save holds other files": lambda w: bad(
        "--save", "choose another folder", save=w.file("saves/other/run/notes.txt", "mine").parent
    ),
    "save inside a file": lambda w: bad(
        "--save", "notes.txt", save=w.file("saves/inside/notes.txt") / "run", **SURGERY
    ),
    "save where nothing can be made": lambda w: bad("--save /proc/none/run", save="/proc/none/run"),
    "save of another run": lambda w: bad("--lr", "(0.5, now 0.0001)", save=w.run_of("lr", '{"lr": 0.5}')),
    "damaged run.json": lambda w: bad("run.json is damaged", save=w.run_of("damaged", '{"lr": ')),
    "NaN in an empty folder": lambda w: bad(
        KEY,
        save=(w.file("saves/empty/run/x").unlink() or w.folder / "saves/empty/run"),
        hf_model=w.model_with_tensor("n3", KEY, with_value(torch.nan)),
    ),
    # so that each of the above is refused for its own reason
    "good run": lambda w: good(save=w.folder / "good/parent/run"),
    "good surgery": lambda w: good(save=w.folder / "good/surgery", **SURGERY),
    # what a run has no use for refuses nothing
    "surgery of a model of few positions": lambda w: good(save=w.folder / "good/surgery1", seq_length=None, **SURGERY),
    "surgery with flags of training": lambda w: good(
        save=w.folder / "good/surgery2",
        seq_length=512,
        distill_top_k=332,
        global_batch_size=3,
        micro_batch_size=2,
        min_lr=1,
        **SURGERY,
    ),
    "surgery with too little data": lambda w: good(
        save=w.folder / "good/surgery3", **SURGERY | dict(train_data=w.file("few.jsonl", '{"text": "a b"}\n'))
    ),
    "surgery without a tokenizer": lambda w: good(
        save=w.folder / "good/surgery4", hf_model=w.model_without("t2", "tokenizer.json"), **SURGERY
    ),
    "cross-entropy with a top k": lambda w: good(
        save=w.folder / "good/ce",
        distill_loss="ce",
        distill_top_k=332,
        **MANUAL | dict(prune_layers="3", train_iters=1),
    ),
    "surgery with data that is not there": lambda w: bad(
        "--train-data", "none.jsonl", status=2, **SURGERY | dict(train_data=w.folder / "none.jsonl")
    ),
    "validated surgery with long windows": lambda w: bad(
        "--seq-length 512", "256", status=2, seq_length=512, valid_data=w.data / "valid.jsonl", **SURGERY
    ),
}


@pytest.fixture(scope="module")
def workshop(tiny_model, tiny_data, tmp_path_factory):
    return Workshop(
        tiny_model("qwen3"), tiny_model("qwen3", max_shard_size="100KB"), tiny_data, tmp_path_factory.mktemp("bad")
    )


@pytest.fixture(scope="module")
def outcomes(workshop):
    """Run every case; return its outcome and the files before and after."""
    cases = {name: make(workshop) for name, make in CASES.items()}
    work = {name: {"argv": argv(case, workshop), "env": case.env} for name, case in cases.items()}
    (workshop.folder / "cases.json").write_text(json.dumps(work))
    before = snapshot(workshop.folder)
    results = workshop.folder.with_name("bad-results.json")
    done = subprocess.run(
        [sys.executable, WORKER, workshop.folder / "cases.json", results],
        env=tiny.environment() | {"HF_HUB_OFFLINE": "1"},
        cwd=workshop.folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return cases, json.loads(results.read_text()), before, snapshot(workshop.folder)


def argv(case, workshop):
    flags = dict(
        hf_model=workshop.model,
        train_data=workshop.data / "train.jsonl",
        save=workshop.folder / "missing" / "parent" / "run",
        num_layers_to_prune=2,
        train_iters=2,
        search_iters=1,
        calibration_samples=2,
        seq_length=32,
    )
    words = []
    for name, value in (flags | case.flags).items():
        if value is not None:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def snapshot(folder):
    """Return every path in a folder with the contents of the file."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(outcomes, name):
    cases, results, _, _ = outcomes
    case, result = cases[name], results[name]
    assert result["status"] == case.status, result["stderr"]
    if case.status == 0:
        return
    assert "Traceback" not in result["stderr"]
    assert result["stderr"].startswith("prune: error: ") and result["stderr"].count("\n") == 1, result["stderr"]
    for words in case.said:
        assert words in result["stderr"]


def test_nothing_is_left_behind(outcomes):
    _, _, before, after = outcomes
    assert {path: body for path, body in after.items() if path.split("/")[0] != "good"} == before


def test_good_runs_made_their_folders(outcomes, workshop):
    cases, _, _, after = outcomes
    for case in (case for case in cases.values() if case.status == 0):
        run = case.flags["save"].relative_to(workshop.folder)
        assert {f"{run}/hf/config.json", f"{run}/hf/model.safetensors", f"{run}/report.json"} <= after.keys()


def test_window_of_a_model_of_few_positions(outcomes):
    _, _, _, after = outcomes
    assert json.loads(after["good/surgery1/report.json"])["seq_length"] == 256


@pytest.mark.parallel
def test_one_line_from_all_ranks(workshop, tmp_path):
    """Only the second rank reads the NaN; the first one creates the run folder before or after that."""
    model = workshop.model_with_tensor("n4", KEY, lambda t: torch.cat([t[:-1], t[-1:] * torch.nan]))
    case = bad(hf_model=model, save=tmp_path / "parent" / "run", tensor_model_parallel_size=2)
    done = subprocess.run(
        [*torchrun(2, "--redirects", "3"), "--log-dir", tmp_path / "logs", PRUNE, *argv(case, workshop)],
        env=tiny.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    by_rank = {path.parent.name: path.read_text() for path in tmp_path.glob("logs/*/attempt_0/*/stderr.log")}
    assert by_rank["0"].startswith("prune: error: ") and by_rank["0"].count("\n") == 1
    assert KEY in by_rank["0"] and by_rank["1"] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
