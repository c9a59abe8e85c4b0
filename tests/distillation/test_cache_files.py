"""A cache's files: complete or absent, and never read unchecked."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from megaprune.distillation import cache_writer
from megaprune.distillation.cache_format import CacheKey, CachePlan, write_manifest
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.distillation.losses import TeacherTargets, VocabShard, teacher_targets
from megaprune.utils.errors import MegapruneError, UsageError

S, K, V, WINDOWS = 3, 2, 70000, 11
KEY = CacheKey("model", "tokenizer", "data", S, WINDOWS, V)
PLAN = CachePlan(KEY, K, "fp32")


def targets_of(windows):
    """Return [s, b, ...], different targets for each window."""
    logits = torch.stack([torch.randn(S, V, generator=torch.Generator().manual_seed(w)) for w in windows], dim=1)
    return teacher_targets(logits, K, VocabShard(0, V, V))


def write_shard(folder, shard, plan=PLAN):
    windows = plan.windows_of(shard)
    with cache_writer.ShardFile(folder, plan, shard) as file:
        for start in range(windows.start, windows.stop, 3):  # no divisor of a shard's 8
            some = range(start, min(start + 3, windows.stop))
            file.add(some, targets_of(some))
        file.close()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    (folder / "c.tmp").mkdir()
    cache_writer.begin(folder / "c.tmp", PLAN)
    for shard in (1, 0):
        write_shard(folder / "c.tmp", shard)
    cache_writer.finish(folder / "c.tmp", folder / "c", PLAN)
    return folder / "c"


def read_all(folder, top_k=K):
    cache = TeacherCache(folder, KEY, top_k)
    cache.check_shards()
    return cache.windows(range(WINDOWS))


def test_files(cache):
    assert {path.name for path in cache.iterdir()} == {"manifest.json", "shard-00000.bin", "shard-00001.bin"}
    assert not cache.with_name("c.tmp").exists()
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["key"] == KEY.__dict__
    assert (manifest["top_k"], manifest["tokens"], manifest["index_bits"]) == (K, S * WINDOWS, 17)
    assert [shard["windows"] for shard in manifest["shards"]] == [8, 3]
    assert [shard["bytes"] for shard in manifest["shards"]] == [p.stat().st_size for p in sorted(cache.glob("shard*"))]


def test_reads_what_was_written_in_any_order(cache):
    expected = targets_of(range(WINDOWS))
    found = read_all(cache)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-3, rtol=1e-3)
    reader = TeacherCache(cache, KEY, K)
    reader.prefetch([9, 2])
    reader.prefetch([2, 5])
    for order in ([2, 9], [5], [7, 7, 0], [9]):
        for name, column in reader.windows(order).__dict__.items():
            assert torch.equal(column, getattr(found, name)[:, order]), name
    assert torch.equal(read_all(cache, top_k=1).logits, found.logits[..., :1])


@pytest.mark.parametrize("file", ["manifest.json", "shard-00000.bin", "shard-00001.bin"])
def test_every_flipped_byte_is_found(cache, tmp_path, file):
    copy = shutil.copytree(cache, tmp_path / "c")
    good = (copy / file).read_bytes()
    for place in range(len(good)):
        for mask in (1, 0x80) if place % 7 == 0 else (0x10,):
            bad = bytearray(good)
            bad[place] ^= mask
            (copy / file).write_bytes(bad)
            if file == "manifest.json" and bytes(bad).strip() == good.strip():
                continue
            with pytest.raises(MegapruneError, match=file) as refused:
                read_all(copy)
            assert "damaged" in str(refused.value) and "\n" not in str(refused.value)


def test_damage_met_ahead_is_found_when_it_is_asked_for(cache, tmp_path):
    copy = shutil.copytree(cache, tmp_path / "c")
    bad = bytearray((copy / "shard-00000.bin").read_bytes())
    bad[2] ^= 1
    (copy / "shard-00000.bin").write_bytes(bad)
    reader = TeacherCache(copy, KEY, K)
    reader.prefetch([0, 1])
    reader.windows([1])
    with pytest.raises(MegapruneError, match="shard-00000.bin is damaged"):
        reader.windows([0])


def test_shards_and_blocks_in_the_place_of_others(cache, tmp_path):
    block = PLAN.layout.num_bytes
    copy = shutil.copytree(cache, tmp_path / "c")
    good = (copy / "shard-00000.bin").read_bytes()
    (copy / "shard-00000.bin").write_bytes(good[block : 2 * block] + good[:block] + good[2 * block :])
    with pytest.raises(MegapruneError, match="shard-00000.bin is damaged"):
        read_all(copy)
    (copy / "shard-00000.bin").write_bytes(good[:-1])
    with pytest.raises(MegapruneError, match="shard-00000.bin is damaged"):
        read_all(copy)
    (copy / "shard-00000.bin").unlink()
    with pytest.raises(MegapruneError, match="shard-00000.bin is missing"):
        read_all(copy)


@pytest.mark.parametrize(
    "other, said",
    [
        (dict(model="x"), "another model"),
        (dict(model="x", tokenizer="x", data="x"), "another model"),
        (dict(tokenizer="x", data="x"), "another tokenizer"),
        (dict(data="x", windows=12), "other data"),
        (dict(seq_length=4, windows=8), "--seq-length 3, not 4"),
    ],
)
def test_caches_of_something_else(cache, other, said):
    with pytest.raises(MegapruneError, match=said) as refused:
        TeacherCache(cache, replace(KEY, **other), K)
    assert f"--teacher-logits {cache}" in str(refused.value) and "cache_teacher.py" in str(refused.value)


def test_more_logits_than_there_are(cache):
    with pytest.raises(UsageError, match="--distill-top-k 3: .* holds 2 logits"):
        TeacherCache(cache, KEY, 3)


def test_no_cache(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(MegapruneError, match="--teacher-logits .* holds no manifest.json"):
            TeacherCache(folder, KEY, K)


def test_manifest_of_another_version(cache, tmp_path, monkeypatch):
    copy = shutil.copytree(cache, tmp_path / "c")
    monkeypatch.setattr("megaprune.distillation.cache_format.FORMAT_VERSION", 2)
    with pytest.raises(MegapruneError, match="version 1, but this release reads version 2"):
        TeacherCache(copy, KEY, K)
    write_manifest(copy, PLAN, ["0"])


def test_shards_are_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), cache_writer.ShardFile(tmp_path, PLAN, 0) as file:
        file.add([0, 1], targets_of([0, 1]))
        raise KeyboardInterrupt
    assert not cache_writer.is_written(tmp_path, PLAN, 0)
    assert [path.name for path in tmp_path.glob("*.bin")] == []
    write_shard(tmp_path, 0)
    assert cache_writer.is_written(tmp_path, PLAN, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["shard-00000.bin"]
    damaged = bytearray((tmp_path / "shard-00000.bin").read_bytes())
    damaged[40] ^= 1
    (tmp_path / "shard-00000.bin").write_bytes(damaged)
    assert not cache_writer.is_written(tmp_path, PLAN, 0)


def test_targets_that_are_no_numbers(tmp_path):
    targets = targets_of([0])
    broken = TeacherTargets(targets.indices, targets.logits, targets.logsumexp * torch.nan, targets.entropy)
    with pytest.raises(MegapruneError, match="not finite in window 0"), cache_writer.ShardFile(tmp_path, PLAN, 0) as f:
        f.add([0], broken)
        f.close()


def test_disks_that_refuse(tmp_path):
    with pytest.raises(MegapruneError, match="shard-00000.bin.tmp can't be written"):
        write_shard(tmp_path / "none", 0)


def test_unfinished_work_of_something_else(tmp_path):
    folder = tmp_path / "c.tmp"
    cache_writer.check_plan(folder, PLAN)
    cache_writer.begin(folder, PLAN)
    cache_writer.check_plan(folder, PLAN)
    for other, said in [
        (replace(PLAN, top_k=3), "another top k"),
        (replace(PLAN, computed_in="bf16"), "another computed in"),
        (replace(PLAN, key=replace(KEY, data="x")), "another data"),
    ]:
        with pytest.raises(MegapruneError, match=said):
            cache_writer.check_plan(folder, other)
    (folder / "plan.json").write_text("{")
    with pytest.raises(MegapruneError, match="plan.json is damaged"):
        cache_writer.check_plan(folder, PLAN)
    (folder / "plan.json").unlink()
    (folder / "mine.txt").write_text("")
    with pytest.raises(MegapruneError, match="holds other files"):
        cache_writer.check_plan(folder, PLAN)
