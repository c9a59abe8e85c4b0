"""Preprocessed data as training, calibration and validation windows. Token i of dataset k is k * 1000 + i."""

import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from megatron.core.datasets import helpers  # noqa: F401  the wheel's compiled helpers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megaprune.data.batches import eval_batches, train_batches
from megaprune.data.blend import Blend, calibration_windows, find_blend, open_blend, training_windows
from megaprune.data.datasets import calibration_ids
from megaprune.data.prepare import prepare_dataset
from megaprune.mcore import datasets
from megaprune.utils.errors import MegapruneError, UsageError

VOCAB = 5000
FLAG = "--train-data"


def make(prefix, base, num_documents, length=10):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for start in range(0, num_documents * length, length):
        builder.add_document(torch.arange(base + start, base + start + length), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two datasets, of 300 and 100 tokens."""
    folder = tmp_path_factory.mktemp("indexed")
    return [make(folder / "a", 0, 30), make(folder / "b", 1000, 10)]


def training(words, cache, *, num_samples=24, seed=7, seq_length=8, calibration=0):
    blend = find_blend(words, FLAG)
    files = open_blend(blend, FLAG, seq_length, VOCAB)
    options = dict(seq_length=seq_length, seed=seed, pad_id=0, vocab_size=VOCAB, cache_dir=cache)
    if calibration:
        return calibration_windows(blend, files, most=calibration, **options)
    return training_windows(blend, files, num_samples=num_samples, **options)


def all_windows(windows):
    return [tuple(windows.window(i)[0].tolist()) for i in range(len(windows))]


def shares(windows):
    """Return the number of windows from each of the two datasets."""
    first = [window[0] for window in all_windows(windows)]
    return [sum(token < 1000 for token in first), sum(token >= 1000 for token in first)]


# Command lines


def test_find_blend(data, tmp_path, monkeypatch):
    a, b = data
    assert find_blend([a], FLAG) == Blend([a], None)
    assert find_blend([a, b], FLAG) == Blend([a, b], None)
    assert find_blend(["0.3", a, "70", b], FLAG) == Blend([a, b], [0.3, 70.0])
    assert find_blend([f"{a}.idx", f"{b}.bin"], FLAG) == Blend([a, b], None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    (tmp_path / "x.jsonl").write_text("{}")
    for words in (["x.jsonl"], ["owner/name"], ["2024"], ["2024", "x.jsonl"], ["./none"], []):
        assert find_blend(words, FLAG) is None, words
    for name in ("0.5", "both"):
        make(name, 0, 3)
    assert find_blend(["0.5"], FLAG) == Blend(["0.5"], None), "what is there is no number"
    (tmp_path / "both").mkdir()
    assert find_blend(["both/"], FLAG) is None
    assert find_blend(["both.idx"], FLAG) == Blend(["both"], None)


MISUSED = {
    "words": (["some", "A", "0.7", "B"], "some is neither a weight nor a preprocessed dataset"),
    "missing": (["A", "/no/where"], "/no/where is neither a weight nor a preprocessed dataset .* no /no/where.idx"),
    "mixed": (["A", "text.jsonl"], "text.jsonl is neither .* can't be mixed with text"),
    "hub": (["owner/name", "A"], "owner/name is neither .* can't be mixed with text or hub"),
    "one weight": (["0.3", "A", "B"], "B has no weight: give one before every dataset"),
    "first": (["A", "0.7", "B"], "A has no weight"),
    "trailing": (["0.3", "A", "0.7"], "0.3 A 0.7: the weight 0.7 is not followed by a dataset"),
    "two weights": (["0.3", "0.7", "A", "B"], "0.3 0.7 A B: the weight 0.7 is not followed"),
    "behind": (["A", "0.3", "B", "0.7"], "A has no weight"),
    "negative": (["-0.3", "A", "0.7", "B"], "-0.3 .*: a weight must be a number above 0"),
    "zero": (["0", "A"], "0 .*: a weight must be a number above 0"),
    "nan": (["nan", "A"], "nan .*: a weight must be a number above 0"),
    "infinite": (["inf", "A", "1", "B"], "inf .*: a weight must be a number above 0"),
    "of text": (["0.3", "text.jsonl", "0.7", "more.jsonl"], "text.jsonl: weights need preprocessed datasets"),
    "gone": (["0.3", "/no/a", "0.7", "/no/b"], "/no/a: weights need preprocessed .* no /no/a.idx"),
    "both": (["both"], "both exists, and so does the preprocessed dataset both.idx: give both/ or both.idx"),
}


@pytest.mark.parametrize("case", MISUSED)
def test_misused_flag(case, data, tmp_path, monkeypatch):
    words, said = MISUSED[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("{}")
    if case == "both":
        make("both", 0, 3)
        (tmp_path / "both").mkdir()
    words = [dict(A=data[0], B=data[1]).get(word, word) for word in words]
    with pytest.raises(UsageError) as caught:
        find_blend(words, FLAG)
    line = str(caught.value).replace(data[0], "A").replace(data[1], "B")
    assert re.match(f"--train-data {said}", line) and "\n" not in line, line


# Files


def damaged(ending, change):
    def damage(prefix):
        path = f"{prefix}.{ending}"
        with open(path, "rb") as file:
            body = bytearray(file.read())
        with open(path, "wb") as file:
            file.write(change(body))

    return damage


def patched(body, at, value):
    body[at : at + len(value)] = value
    return body


def gone(ending):
    return lambda prefix: os.unlink(f"{prefix}.{ending}")


DAMAGED = {
    "no bin": (gone("bin"), r"a.bin is missing beside a.idx"),
    "no idx": (gone("idx"), r"a.idx is missing beside a.bin"),
    "empty idx": (damaged("idx", lambda b: b""), "a.idx is not an index of Megatron's"),
    "another file": (damaged("idx", lambda b: b"PK" + b), "a.idx is not an index of Megatron's"),
    "header": (damaged("idx", lambda b: b[:20]), "a.idx is truncated within its header"),
    "version": (damaged("idx", lambda b: patched(b, 9, b"\x07")), "a.idx has version 7"),
    "floats": (damaged("idx", lambda b: patched(b, 17, b"\x07")), "dtype 7, which hold no tokens"),
    "cut idx": (damaged("idx", lambda b: b[:-1]), "a.idx has 641 bytes, but its header needs 642: it is truncated"),
    "long idx": (damaged("idx", lambda b: b + b"x"), "a.idx has 643 bytes, but its header needs 642"),
    "lengths": (damaged("idx", lambda b: patched(b, 34, b"\x0b")), "lengths and offsets don't fit each other"),
    "cut bin": (damaged("bin", lambda b: b[:-2]), "a.bin has 598 bytes, but its index needs 600: it is truncated"),
    "long bin": (damaged("bin", lambda b: b + b"12"), "a.bin has 602 bytes, but its index needs 600"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case, data, tmp_path):
    damage, said = DAMAGED[case]
    prefix = str(tmp_path / "a")
    for ending in ("bin", "idx"):
        shutil.copy(f"{data[0]}.{ending}", f"{prefix}.{ending}")
    damage(prefix)
    with pytest.raises(MegapruneError, match=said) as caught:
        open_blend(Blend([prefix], None), FLAG, 8, VOCAB)
    assert str(caught.value).startswith(f"{FLAG} ") and "\n" not in str(caught.value)


def test_tokens_beyond_the_vocabulary(data):
    open_blend(Blend(data[:1], None), FLAG, 8, vocab_size=300)
    with pytest.raises(MegapruneError, match="a holds token 299, and the model's vocabulary has 299: .* own tokenizer"):
        open_blend(Blend(data[:1], None), FLAG, 8, vocab_size=299)


def test_too_little_for_a_window(data, one_process, tmp_path):
    with pytest.raises(MegapruneError, match="b holds 100 tokens, but one window needs 101: .* smaller --seq-length"):
        open_blend(Blend(data, None), FLAG, 100, VOCAB)
    with pytest.raises(UsageError, match="b is too small for a choice of calibration windows"):
        training(["1", data[0], "9", data[1]], tmp_path, seq_length=60, calibration=4)


def test_empty_documents_are_accepted(tmp_path):
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    for document in ([], [1, 2, 3], [], [4, 5]):
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(tmp_path / "a.idx"))
    [file] = open_blend(Blend([str(tmp_path / "a")], None), FLAG, 4, VOCAB)
    assert file.num_tokens == 5 and file.tokens().tolist() == [1, 2, 3, 4, 5]


# Order


def test_one_epoch_holds_every_window_once(data, one_process, tmp_path):
    windows = training(data[:1], tmp_path, num_samples=37)
    found = all_windows(windows)
    assert len(found) == 37 == (300 - 1) // 8
    tokens, loss_mask = windows.window(5)
    assert tokens.dtype == np.int64 and tokens.shape == (9,)
    assert loss_mask.dtype == np.float32 and loss_mask.tolist() == [1] * 8
    # Documents are shuffled whole; neighboring windows share one token.
    assert len({token for window in found for token in window[1:]}) == 37 * 8
    assert found != sorted(found)
    with pytest.raises(IndexError):
        windows.window(37)


def test_blend_keeps_its_weights_over_epochs(data, one_process, tmp_path):
    assert shares(training(["0.3", data[0], "0.7", data[1]], tmp_path, num_samples=100)) == [30, 70]
    assert shares(training(["30", data[0], "70", data[1]], tmp_path, num_samples=100)) == [30, 70]
    assert shares(training(["0.001", data[0], "1", data[1]], tmp_path, num_samples=10))[1] >= 9
    # 37 and 12 windows an epoch
    assert shares(training(data, tmp_path, num_samples=98)) == [74, 24]


@pytest.mark.parametrize("words", [lambda a, b: [a], lambda a, b: ["2", a, "3", b]])
def test_order_follows_seed_alone(data, one_process, tmp_path, words):
    words = words(*data)
    first = training(words, tmp_path / "one")
    again, mapped = training(words, tmp_path / "two"), training(words, tmp_path / "one")
    assert all_windows(first) == all_windows(again) == all_windows(mapped)
    assert first.fingerprint == again.fingerprint
    other = training(words, tmp_path / "one", seed=8)
    assert all_windows(other) != all_windows(first) and other.fingerprint != first.fingerprint


@pytest.mark.parametrize(("micro_batch_size", "dp_size"), [(1, 1), (2, 1), (1, 2), (1, 4)])
def test_global_batches_are_the_same_at_every_layout(data, one_process, tmp_path, micro_batch_size, dp_size):
    windows = training(["1", data[0], "2", data[1]], tmp_path, num_samples=12)
    for iteration in (2, 0):  # as a resumed run would, without those before
        ranks = [
            train_batches(
                windows,
                iteration=iteration,
                global_batch_size=4,
                micro_batch_size=micro_batch_size,
                dp_rank=rank,
                dp_size=dp_size,
                seed=7,
            )
            for rank in range(dp_size)
        ]
        batches = [batch for micro in zip(*ranks, strict=True) for batch in micro]
        assert [i for batch in batches for i in batch.sample_ids] == list(range(4 * iteration, 4 * iteration + 4))
        rows = torch.cat([torch.cat([b.tokens, b.labels[:, -1:]], dim=1) for b in batches]).tolist()
        assert [tuple(row) for row in rows] == all_windows(windows)[4 * iteration : 4 * iteration + 4]


def test_calibration_windows_differ_from_each_other(data, one_process, tmp_path):
    found = training(data[:1], tmp_path, calibration=1000)
    assert len(found) == len(set(all_windows(found))) == 37
    blended = training(["1", data[0], "2", data[1]], tmp_path, calibration=1000)
    assert 8 <= len(blended) <= 18 and len(set(all_windows(blended))) == len(blended)
    assert abs(shares(blended)[1] - 2 * shares(blended)[0]) <= 2
    assert len(training(data, tmp_path, calibration=5)) == 5
    assert all_windows(training(data[:1], tmp_path, calibration=24)) != all_windows(training(data[:1], tmp_path))
    with pytest.raises(UsageError, match="--calibration-samples 40 is more than the 37 windows"):
        calibration_ids(len(found), 40, seed=1)


# Index files


def test_index_files_are_mapped_and_made_once(data, one_process, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    words = ["1", data[0], "2", data[1]]
    windows = training(words, cache)
    assert isinstance(windows.dataset.dataset_index, np.memmap)
    for part in windows.dataset.datasets:
        assert all(isinstance(i, np.memmap) for i in (part.document_index, part.sample_index, part.shuffle_index))
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    assert not list(cache.rglob("*.tmp")) and len(list(cache.glob("indexed/*"))) == 1
    monkeypatch.setattr(helpers, "build_sample_idx", lambda *a: pytest.fail("built again"))
    training(words, cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == files


def test_interrupted_build_leaves_nothing(data, one_process, tmp_path, monkeypatch):
    def full_disk(*args, **options):
        raise OSError(28, "No space left on device")

    def terminated(*args, **options):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr("numpy.save", full_disk)
        with pytest.raises(MegapruneError, match="--data-cache-path: .* can't be written .No space left on device."):
            training(data, tmp_path)
        patch.setattr("numpy.save", terminated)
        with pytest.raises(SystemExit):
            training(data, tmp_path)
    assert not list((tmp_path / "indexed").iterdir())
    assert len(training(data, tmp_path)) == 24


def test_other_data_at_the_same_path_gets_its_own_indices(one_process, tmp_path):
    prefix = make(tmp_path / "a", 0, 30)
    first = training([prefix], tmp_path / "cache")
    make(tmp_path / "a", 0, 10, length=20)
    second = training([prefix], tmp_path / "cache")
    assert first.fingerprint != second.fingerprint
    assert max(max(window) for window in all_windows(second)) < 200


def test_unwritable_cache(data, one_process, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MegapruneError, match="--data-cache-path: .*file.* can't be written"):
        training(data, tmp_path / "file")


def test_missing_helpers_are_one_clear_line(data, one_process, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers", None)
    monkeypatch.delattr("megatron.core.datasets.helpers")
    with pytest.raises(MegapruneError, match="compiled dataset helpers .*install a wheel") as caught:
        training(data, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("weights", [[1, 1], [1, 999], [1, 2, 3], [0.01] * 7 + [0.93], [5, 1, 1, 1]])
def test_every_blend_has_enough_samples(weights, num_samples):
    """Megatron-Core refuses a blend that requests more samples of a dataset than were indexed."""
    have = datasets.samples_indexed(weights, num_samples)
    share = np.array(weights, np.float64) / np.sum(weights)
    size = int(np.ceil(num_samples * share).sum())
    index, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    helpers.build_blending_indices(index, sample, share.tolist(), len(share), size, False)
    assert (np.bincount(index, minlength=len(share)) <= have).all()


# Validation


def test_validation_reads_each_dataset_once_in_order(data):
    tokenizer = type("Tokenizer", (), {"eos_token_id": 0})
    options = dict(seq_length=8, cache_dir=None, flag="--valid-data", pad_last=True, vocab_size=VOCAB)

    def predicted(words):
        windows = prepare_dataset(words, tokenizer, **options)
        batches = list(eval_batches(windows, micro_batch_size=4, dp_rank=0, dp_size=1))
        return torch.cat([batch.labels[batch.loss_mask == 1] for batch in batches]).tolist()

    assert predicted(data[:1]) == list(range(1, 300))
    assert predicted(data) == [*range(1, 300), *range(1001, 1100)]
    with pytest.raises(UsageError, match="--valid-data takes no weights"):
        predicted(["0.5", data[0], "0.5", data[1]])
    with pytest.raises(MegapruneError, match="--valid-data .*a holds token 299"):
        prepare_dataset(data, tokenizer, **options | {"vocab_size": 10})
