"""Teacher caching, and learning from a cache, on one process."""

import gc
import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import save_file

from megaprune.cli import main as cli
from megaprune.distillation.cache_writer import ShardFile
from megaprune.mcore import parallel
from megaprune.pruning.models import Models
from megaprune.report.metrics import read_metrics
from tests.helpers import tiny


def cache_argv(model, data, output, *extra):
    flags = ["--hf-model", model, "--train-data", data / "train.jsonl", "--seq-length", tiny.SEQ_LENGTH]
    return [str(word) for word in (*flags, "--distill-top-k", 10, "--micro-batch-size", 2, "--output", output, *extra)]


def cache(*argv):
    """Return the status and the error line of the command."""
    try:
        return cli.attempt("cache-teacher", cache_argv(*argv))
    finally:
        parallel.finish()


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3_tied")


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Write fewer windows than other tests use."""
    return tiny.make_data_folder(tmp_path_factory.mktemp("data"), train_rows=40, valid_rows=8)


@pytest.fixture(scope="module")
def cached(model, tiny_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "cache"
    assert cache(model, tiny_data, folder) == (0, None)
    return folder


def prune_argv(model, data, save, *extra):
    """Return the flags of a short search and recovery."""
    return tiny.prune_argv(
        model, data, save, "--train-iters", "4", "--search-iters", "2", "--lr-warmup-iters", "1", *extra
    )


def from_cache(cached):
    return "--teacher", "cached", "--teacher-logits", str(cached)


def losses(run):
    return [record["loss"] for record in read_metrics(run)]


def test_window_fits_the_model_by_default(model, tiny_data, tmp_path, capsys):
    argv = cache_argv(model, tiny_data, tmp_path / "c", "--dry-run", "--method", "manual", "--train-iters", "0")
    at = argv.index("--seq-length")
    try:
        assert cli.attempt("cache-teacher", argv[:at] + argv[at + 2 :]) == (0, None)
    finally:
        parallel.finish()
    tokens, windows = capsys.readouterr().out.split(" windows")[0].split(" tokens in ")
    assert int(tokens.replace(",", "")) == 256 * int(windows)
    status, line = cache(
        model, tiny_data, tmp_path / "c", "--method", "manual", "--train-iters", "0", "--seq-length", "512"
    )
    assert status == 2 and "--seq-length 512 is more than the model's 256 positions" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [
        ("--micro-batch-size", "4", "--seed", "7"),
        ("--lora-rank", "4", "--distill-loss", "kl", "--distill-tail", "full", "--distill-top-k", "4"),
    ],
)
def test_losses_are_those_of_the_teacher_itself(cached, model, tiny_data, tmp_path, flags):
    tiny.run_here(prune_argv(model, tiny_data, tmp_path / "online", *flags))
    tiny.run_here(prune_argv(model, tiny_data, tmp_path / "cached", *flags, *from_cache(cached)))
    expected = losses(tmp_path / "online")
    assert len(expected) == 4 and max(expected) > 0.1
    assert losses(tmp_path / "cached") == pytest.approx(expected, abs=1e-3, rel=1e-3)
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("online", "cached")]
    assert reports[0]["kept_layers"] == reports[1]["kept_layers"]
    assert reports[1]["valid"]["recovered"]["loss"] == pytest.approx(reports[0]["valid"]["recovered"]["loss"], rel=1e-3)


def recovery_argv(model, data, save, *extra):
    argv = tiny.prune_argv(model, data, save, "--method", "manual", "--prune-layers", "2,4", "--train-iters", "4")
    argv += ["--stitch", "none"]
    for flag in ("--search-iters", "--num-layers-to-prune", "--lr-warmup-iters"):
        at = argv.index(flag)
        del argv[at : at + 2]
    return [*argv, *extra]


def test_no_teacher_is_built_where_nothing_measures_it(cached, model, tiny_data, tmp_path, monkeypatch):
    def built(self, *args, **kwargs):
        raise AssertionError("the original model was built")

    monkeypatch.setattr(Models, "original", built)
    argv = recovery_argv(model, tiny_data, tmp_path / "run", *from_cache(cached))
    at = argv.index("--valid-data")
    del argv[at : at + 2]
    tiny.run_here(argv)
    assert len(losses(tmp_path / "run")) == 4


def test_the_original_goes_when_it_is_measured(cached, model, tiny_data, tmp_path, monkeypatch):
    original, pruned, seen = Models.original, Models.pruned_student, []

    def built(self, *args, **kwargs):
        model = original(self, *args, **kwargs)
        seen.append(weakref.ref(model))
        return model

    def begun(self, *args):
        gc.collect()
        assert [model() for model in seen] == [None]
        return pruned(self, *args)

    monkeypatch.setattr(Models, "original", built)
    monkeypatch.setattr(Models, "pruned_student", begun)
    tiny.run_here(recovery_argv(model, tiny_data, tmp_path / "run", *from_cache(cached)))
    assert len(seen) == 1


def test_what_is_made(cached, model, tiny_data, capsys):
    before = files(cached)
    assert set(before) == {"manifest.json", *(f"shard-{n:05d}.bin" for n in range(len(before) - 1))}
    assert [path.name for path in cached.parent.iterdir()] == ["cache"]
    assert cache(model, tiny_data, cached) == (0, None)
    assert f"{cached} holds the finished cache already" in capsys.readouterr().out
    assert files(cached) == before and [path.name for path in cached.parent.iterdir()] == ["cache"]


def test_size_and_time_are_told_before(model, tiny_data, cached, tmp_path, capsys):
    manifest = json.loads((cached / "manifest.json").read_text())
    assert cache(model, tiny_data, tmp_path / "c", "--dry-run") == (0, None)
    out = capsys.readouterr().out
    assert f"{manifest['tokens']:,} tokens in {manifest['key']['windows']} windows: " in out
    assert "bytes a token" in out and list(tmp_path.iterdir()) == []
    assert cache(model, tiny_data, tmp_path / "c") == (0, None)
    out = capsys.readouterr().out
    assert out.index("bytes a token") < out.index("tokens to compute: about ") < out.index("written to ")
    assert files(tmp_path / "c") == files(cached)


@pytest.mark.parametrize("moment", [0, 5, 12])
def test_killed_and_resumed(cached, model, tiny_data, tmp_path, monkeypatch, capsys, moment):
    """Stop after a number of micro-batches; in the last case, damage a shard before resuming."""
    count = iter(range(1000))
    add = ShardFile.add

    def killed(self, windows, targets):
        add(self, windows, targets)
        if next(count) == moment:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "add", killed)
        status, line = cache(model, tiny_data, tmp_path / "c")
    assert status == 130 and line.startswith("cache-teacher: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["c.tmp"]
    found = sorted((tmp_path / "c.tmp").glob("shard-*.bin"))
    assert len(found) == moment // 4
    if moment == 12:
        damaged = bytearray(found[1].read_bytes())
        damaged[100] ^= 1
        found[1].write_bytes(damaged)
    capsys.readouterr()
    assert cache(model, tiny_data, tmp_path / "c") == (0, None)
    assert ("continuing: " in capsys.readouterr().out) == (moment > 0)
    assert files(tmp_path / "c") == files(cached)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.fixture(scope="module")
def others(model, tiny_data, tmp_path_factory):
    """Inputs that differ from those of the cache in one thing."""
    folder = tmp_path_factory.mktemp("others")
    tiny.make_model(folder / "model", "qwen3_tied")
    tensors = tiny.read_tensors(folder / "model")
    noise = torch.Generator().manual_seed(1)
    moved = {name: t + 1e-3 * torch.randn(t.shape, generator=noise) for name, t in tensors.items()}
    save_file(moved, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(model, folder / "tokenizer")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    tiny.make_data(folder / "data.jsonl", rows=40, seed=3)
    return folder


@pytest.fixture(scope="module")
def damaged(cached, tmp_path_factory):
    copy = shutil.copytree(cached, tmp_path_factory.mktemp("damaged") / "cache")
    for shard in copy.glob("shard-*.bin"):
        flipped = bytearray(shard.read_bytes())
        flipped[11] ^= 4
        shard.write_bytes(flipped)
    return copy


REFUSED = {
    "model": (lambda o: {"--hf-model": o / "model"}, "made from another model", 1),
    "tokenizer": (lambda o: {"--hf-model": o / "tokenizer"}, "made from another tokenizer", 1),
    "data": (lambda o: {"--train-data": o / "data.jsonl"}, "made from other data", 1),
    "sequence": (lambda o: {"--seq-length": 16}, "made with --seq-length 32, not 16", 1),
    "k": (lambda o: {"--distill-top-k": 11}, "--distill-top-k 11", 2),
    "folder": (lambda o: {"--teacher-logits": o}, "holds no manifest.json", 1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_caches_that_do_not_fit(cached, model, tiny_data, others, tmp_path, name):
    flags, said, status = REFUSED[name]
    argv = recovery_argv(model, tiny_data, tmp_path / "run", *from_cache(cached))
    for flag, value in flags(others).items():
        if flag in argv:
            argv[argv.index(flag) + 1] = str(value)
        else:
            argv += [flag, str(value)]
    found, line = cli.attempt("prune", argv)
    parallel.finish()
    assert found == status and said in line and line.count("\n") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_is_not_trained_on(damaged, model, tiny_data, tmp_path):
    status, line = cli.attempt("prune", recovery_argv(model, tiny_data, tmp_path / "run", *from_cache(damaged)))
    parallel.finish()
    assert status == 1 and "is damaged" in line and "/shard-000" in line
    assert not (tmp_path / "run" / "hf").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_outputs_that_are_taken(cached, model, tiny_data, others, tmp_path):
    (tmp_path / "mine").mkdir()
    before = files(cached)
    for output, extra, said in [
        (tmp_path / "mine", [], "holds no teacher cache"),
        (cached, ["--seq-length", "16"], "made with --seq-length 32, not 16"),
        (cached, ["--distill-top-k", "5"], "--distill-top-k 10, not 5"),
        (cached, ["--bf16"], "the teacher in fp32, not bf16"),
    ]:
        status, line = cache(model, tiny_data, output, *extra)
        assert status == 1 and f"--output {output}" in line and said in line, line
    assert files(cached) == before and [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert [path.name for path in cached.parent.iterdir()] == ["cache"]


@pytest.mark.parametrize(
    "extra, said, status",
    [
        (["--seq-length", "5000"], "--seq-length 5000", 2),
        (["--distill-top-k", "332"], "--distill-top-k 332", 2),
        (["--train-data", "none.jsonl"], "--train-data", 2),
        (["--micro-batch-size", "0"], "--micro-batch-size 0", 2),
        (["--hf-model", "none"], "--hf-model none", 1),
        (["--load", "none"], "--load", 2),
    ],
)
def test_bad_input(model, tiny_data, tmp_path, extra, said, status):
    found, line = cache(model, tiny_data, tmp_path / "c", *extra)
    assert found == status and said in line, line
    assert list(tmp_path.iterdir()) == []


def test_nowhere_to_write(model, tiny_data):
    status, line = cache(model, tiny_data, "/proc/none/c")
    assert status == 1 and "/proc/none" in line


def test_flags_that_belong_together(model, tiny_data, tmp_path, cached):
    for extra, said in [
        (["--teacher", "cached"], "--teacher cached and --teacher-logits go together"),
        (["--teacher-logits", "c"], "--teacher cached and --teacher-logits go together"),
        ([*from_cache(cached), "--distill-loss", "ce"], "--distill-loss ce"),
    ]:
        status, line = cli.attempt("prune", prune_argv(model, tiny_data, tmp_path / "run", *extra))
        assert status == 2 and said in line
    assert cli.attempt("cache-teacher", cache_argv(model, tiny_data, tmp_path)[:-2])[0] == 2


def test_preprocessed_data_is_cached_as_it_lies(model, tiny_data, tmp_path):
    # without chats, whose loss mask is lost when they are preprocessed
    rows = [row for row in (tiny_data / "train.jsonl").read_text().splitlines() if "text" in json.loads(row)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    shutil.copy(tiny_data / "valid.jsonl", tmp_path)
    tiny_data = tmp_path
    words = ["--input", str(tiny_data / "train.jsonl"), "--tokenizer", str(model)]
    assert cli.attempt("preprocess-data", [*words, "--output-prefix", str(tmp_path / "p")]) == (0, None)
    data = ["--train-data", str(tmp_path / "p")]
    assert cache(model, tiny_data, tmp_path / "c", *data) == (0, None)
    tiny.run_here(recovery_argv(model, tiny_data, tmp_path / "text"))
    tiny.run_here(recovery_argv(model, tiny_data, tmp_path / "run", *from_cache(tmp_path / "c"), *data))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "text"), abs=1e-3)
    run = cli.attempt(
        "prune", recovery_argv(model, tiny_data, tmp_path / "no", *from_cache(tmp_path / "c"), *blended(data))
    )
    parallel.finish()
    for status, line in (run, cache(model, tiny_data, tmp_path / "no", *blended(data))):
        assert status == 2 and "a cached teacher needs windows in the order of the files" in line
    assert not (tmp_path / "no").exists()


def blended(data):
    return [data[0], "0.5", data[1]]
