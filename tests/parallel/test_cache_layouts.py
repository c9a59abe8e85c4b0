"""Caches made at any layout, and runs that learn from them at any other."""

import shutil

import pytest
import torch

from megaprune.distillation.cache_format import read_manifest
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.report.metrics import read_metrics
from tests.helpers import tiny
from tests.helpers.launch import launch_cases
from tests.parallel.cache_cases import CACHE_LAYOUTS, RUN_LAYOUTS, argv, cache, run_argv

DENSE, MOE = "qwen3_tied", "deepseek_v3"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def tiny_data(tmp_path_factory):
    """Write fewer windows than other tests use."""
    return tiny.make_data_folder(tmp_path_factory.mktemp("data"), train_rows=40, valid_rows=2)


@pytest.fixture(scope="module")
def alone(tiny_model, tiny_data, tmp_path_factory):
    """Caches that one process makes, by family."""
    folder = tmp_path_factory.mktemp("alone")
    for family in (DENSE, MOE):
        cache(argv(tiny_model(family), tiny_data, folder / family))
    return folder


@pytest.fixture(scope="module")
def together(alone, tiny_model, tiny_data, tmp_path_factory):
    """Results of two processes."""
    folder = tmp_path_factory.mktemp("together")
    damaged = shutil.copytree(alone / DENSE, folder / "damaged")
    for shard in damaged.glob("shard-*.bin"):
        flipped = bytearray(shard.read_bytes())
        flipped[5] ^= 1
        shard.write_bytes(flipped)
    model = tiny_model(DENSE)
    cases = {
        f"cache-{name}": dict(
            kind="cache_cases.cache", argv=argv(tiny_model(family), tiny_data, folder / f"cache-{name}", *flags)
        )
        for name, (family, flags) in CACHE_LAYOUTS.items()
    }
    for name, flags in RUN_LAYOUTS.items():
        words = run_argv(model, tiny_data, folder / f"run-{name}", alone / DENSE, *flags)
        cases[f"run-{name}"] = dict(kind="cache_cases.prune", argv=words)
    pp2 = CACHE_LAYOUTS["pp2"][1]
    words = argv(model, tiny_data, folder / "cache-stopped")
    cases["cache-stopped"] = dict(kind="cache_cases.interrupted_cache", argv=words, rounds=2)
    words = run_argv(model, tiny_data, folder / "refused", damaged, *pp2)
    cases["refused"] = dict(kind="cache_cases.refused_run", argv=words, said="is damaged")
    return launch_cases(2, cases, folder)


@pytest.mark.parametrize("layout", CACHE_LAYOUTS)
def test_cache_is_the_same_at_every_layout(alone, together, layout):
    family, expected = CACHE_LAYOUTS[layout][0], alone / CACHE_LAYOUTS[layout][0]
    found = together.path(f"cache-{layout}")
    before, after = files(expected), files(found)
    assert {name: len(body) for name, body in after.items()} == {name: len(body) for name, body in before.items()}
    if layout == "dp2":
        assert after == before
    plan, _ = read_manifest(expected, "")
    assert read_manifest(found, "")[0] == plan
    wanted, targets = (TeacherCache(path, plan.key, 10).windows(range(plan.key.windows)) for path in (expected, found))
    same = (targets.indices == wanted.indices).all(-1)  # except for ties within rounding
    assert same.float().mean() > 0.99, family
    for name in ("logits", "logsumexp", "entropy"):
        torch.testing.assert_close(getattr(targets, name), getattr(wanted, name), atol=4e-3, rtol=2e-3, msg=name)


def test_stopped_and_gone_on_with(alone, together):
    assert files(together.path("cache-stopped")) == files(alone / DENSE)


@pytest.mark.parametrize("layout", RUN_LAYOUTS)
def test_losses_are_those_of_the_teacher_itself(together, tiny_model, tiny_data, tmp_path, layout):
    flags = RUN_LAYOUTS[layout]
    alone = [word for word in flags if word not in CACHE_LAYOUTS[layout][1]]
    tiny.run_here(run_argv(tiny_model(DENSE), tiny_data, tmp_path / "online", None, *alone))
    losses = [[r["loss"] for r in read_metrics(run)] for run in (together.path(f"run-{layout}"), tmp_path / "online")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3, rel=1e-3)
    assert len(losses[0]) == 4 and max(losses[0]) > 0.1


def test_damage_is_refused_by_every_process(together):
    assert not together.path("refused").exists()
