"""Teacher caching, and runs that learn from a cache, on any number of processes."""

from megaprune.cli.cache_teacher import cache_from_flags
from megaprune.mcore import parallel
from megaprune.pruning.cache_teacher import Caching
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny

_TP2, _PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
# Family and flags of each cache that 2 processes write.
CACHE_LAYOUTS = {
    "tp2": ("qwen3_tied", (*_TP2, "--sequence-parallel")),
    "pp2": ("qwen3_tied", _PP2),
    "dp2": ("qwen3_tied", ()),
    "moe_ep2": ("deepseek_v3", ("--expert-model-parallel-size", "2")),
}
# Flags of each run on 2 processes that learns from the cache of one process, with another layout than the cache's.
RUN_LAYOUTS = {
    "tp2": (*_TP2, "--seed", "5"),
    "pp2": (*_PP2, "--micro-batch-size", "1", "--seed", "6"),
    "dp2": (
        "--micro-batch-size",
        "1",
    ),
}


def argv(model, data, output, *extra):
    """Return the flags of a cache of the tests' data."""
    flags = ["--hf-model", model, "--train-data", data / "train.jsonl", "--seq-length", tiny.SEQ_LENGTH]
    return [str(word) for word in (*flags, "--micro-batch-size", 2, "--output", output, *extra)]


def run_argv(model, data, save, cache, *extra):
    """Return the flags of a short recovery, from a cache or (None) from the online teacher."""
    taught = ("--teacher", "cached", "--teacher-logits", str(cache)) if cache else ()
    argv = tiny.prune_argv(model, data, save, "--method", "random", "--train-iters", "4", *taught, *extra)
    argv += ["--stitch", "none"]
    for flag in ("--search-iters", "--valid-data"):
        at = argv.index(flag)
        del argv[at : at + 2]
    return argv


def cache(argv):
    """Write a complete cache."""
    try:
        cache_from_flags(argv)
    finally:
        parallel.finish()


def interrupted_cache(argv, rounds):
    """Stop a cache after a number of rounds of shards, and resume it."""

    class Stopped(Exception):
        pass

    done, whole_round = [], Caching.write_round

    def stopping(self, *args):
        if len(done) == rounds:
            raise Stopped
        whole_round(self, *args)
        done.append(None)

    Caching.write_round = stopping
    try:
        cache(argv)
    except Stopped:
        pass
    finally:
        Caching.write_round = whole_round
    assert len(done) == rounds
    cache(argv)


def refused_run(argv, said):
    """Check that every process refuses a run, whichever of them finds the reason."""
    try:
        tiny.run_here(argv)
    except MegapruneError as refused:
        assert said in str(refused), refused
    else:
        raise AssertionError(f"{said}: not refused")


def prune(argv):
    """Complete a run."""
    tiny.run_here(argv)
