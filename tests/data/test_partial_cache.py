"""The token cache by worker processes, and after interruptions: the same files."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from megaprune.data import encoder, parallel_encoder, partial_cache, preprocess
from megaprune.data.parallel_encoder import Workers
from megaprune.data.partial_cache import PartialCache
from megaprune.data.prepare import prepare_dataset
from megaprune.utils import stopping
from megaprune.utils.errors import MegapruneError, RunStopped
from megaprune.utils.stopping import StopRequest
from tests.helpers import tiny

MARKED = "{% for m in messages %}{% generation %}{{ m['content'] }}<|eos|>{% endgeneration %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer as a run has it: loaded from a folder."""
    from megaprune.data.tokenizer import tokenizer_in

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return tokenizer_in(folder, False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Texts, chats and empty rows, in several batches."""
    path = tiny.make_data(tmp_path_factory.mktemp("data") / "train.jsonl", rows=1300, seed=4)
    lines = path.read_text().splitlines(keepends=True)
    for at in (3, 600, 601):
        lines.insert(at, '{"text": ""}\n')
    path.write_text("".join(lines))
    return path


def prepare(data, tokenizer, cache, workers):
    prepare_dataset([str(data)], tokenizer, seq_length=16, cache_dir=cache, workers=Workers(workers))
    return {path.name: path.read_bytes() for path in files_in(cache)}


def files_in(cache):
    (folder,) = cache.iterdir()
    assert len(folder.name) == 64, "the cache holds unfinished work"
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def alone(data, tokenizer, tmp_path_factory):
    return prepare(data, tokenizer, tmp_path_factory.mktemp("alone") / "cache", 1)


def test_one_process_without_a_limit_writes_the_same(data, tokenizer, tmp_path, alone):
    assert set(alone) == {"tokens.bin", "loss_mask.bin", "document_offsets.bin", "meta.json"}
    assert json.loads(alone["meta.json"])["documents"] == 1300
    assert prepare(data, tokenizer, tmp_path / "cache", None) == alone


@pytest.mark.slow
def test_workers_write_the_same_and_go_on_after_any_stop(data, tokenizer, tmp_path, alone, capfd):
    """Stop after a batch of this process, then after one of the workers, and let these finish."""

    class Asked(StopRequest):
        def is_due(self, stage):
            return stage == "tokenizing"

    for workers, documents in ((1, 512), (2, 1022)):  # of the 512 rows of the second batch, two are empty
        with pytest.raises(RunStopped, match=f"after {documents:,}") as stop, stopping.obeying(Asked(signals=False)):
            prepare(data, tokenizer, tmp_path / "cache", workers)
        assert stop.value.progressed
    assert prepare(data, tokenizer, tmp_path / "cache", 2) == alone
    assert capfd.readouterr() == ("", ""), "a worker warns"


@pytest.mark.parametrize("damage", ["no end", "journal", "tokens.bin", "loss_mask.bin", "all"])
def test_what_was_written_before_a_kill_is_kept_as_far_as_it_is_whole(
    data, tokenizer, tmp_path, alone, monkeypatch, damage
):
    add, added = PartialCache.add, []

    def killed(self, batch):
        add(self, batch)
        added.append(batch)
        if len(added) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartialCache, "add", killed)
        prepare(data, tokenizer, tmp_path / "cache", 1)
    (partial,) = (path for path in (tmp_path / "cache").iterdir() if path.suffix == ".partial")
    whole = {"no end": 2, "all": 0}.get(damage, 1)
    if damage in ("no end", "journal"):
        journal = partial / partial_cache.JOURNAL
        journal.write_bytes(journal.read_bytes() + b'{"documents": 1' if whole == 2 else journal.read_bytes()[:-1])
    for name in ("tokens.bin", "loss_mask.bin") if damage == "all" else [damage] if "." in damage else []:
        written = bytearray((partial / name).read_bytes())
        written[0 if damage == "all" else -1] ^= 1
        (partial / name).write_bytes(written)
    encoded, encode = [], encoder.Encoder.encode_batch

    def counted(self, batch):
        encoded.extend(batch)
        return encode(self, batch)

    monkeypatch.setattr(encoder.Encoder, "encode_batch", counted)
    assert prepare(data, tokenizer, tmp_path / "cache", 1) == alone
    assert len(encoded) == 1300 - sum(len(batch.lengths) for batch in added[:whole])


def test_a_refused_row_leaves_nothing(data, tokenizer, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(data.read_text() + '{"body": 1}\n')
    with pytest.raises(MegapruneError, match="line 1304 has neither"):
        prepare(bad, tokenizer, tmp_path / "cache", None)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_workers_are_refused_another_tokenizer_and_end_with_a_killed_parent(data, tokenizer, tmp_path, monkeypatch):
    other = tiny.make_tokenizer()
    other.add_tokens(["<extra>"])
    other.name_or_path = tokenizer.name_or_path
    with pytest.raises(MegapruneError, match="holds another tokenizer than the one that is used"):
        prepare(data, other, tmp_path / "cache", 2)
    script = f"""
import sys, time
from megaprune.data.partial_cache import PartialCache
from megaprune.data.parallel_encoder import Workers
from megaprune.data.prepare import prepare_dataset
from megaprune.data.tokenizer import tokenizer_in

def hold(self, batch):
    print("holding", flush=True)
    time.sleep(600)

PartialCache.add = hold
# no guard of the main module: workers must not run it again
prepare_dataset(["{data}"], tokenizer_in("{tokenizer.name_or_path}", False), seq_length=16,
    cache_dir=sys.argv[1], workers=Workers(2))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "killed")], env=tiny.environment(), stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"holding\n"
    workers = [pid for pid in os.listdir("/proc") if pid.isdecimal() and descends(int(pid), process.pid)]
    assert len(workers) == 3  # two, and the process that they were forked from
    process.send_signal(signal.SIGKILL)
    process.wait()
    for _ in range(300):
        if not any(os.path.exists(f"/proc/{pid}") for pid in workers):
            return
        time.sleep(0.2)
    raise AssertionError("workers outlive their parent")


def descends(pid, ancestor):
    while pid > 1:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                pid = int(stat.read().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == ancestor:
            return True
    return False


def test_available_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for given, expected in (("1", 1), ("100000", cores), ("", cores), ("many", cores)):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", given)
        assert parallel_encoder.available_cpus() == expected
    assert preprocess.BATCH_ROWS == 512, "the tests above count batches"
