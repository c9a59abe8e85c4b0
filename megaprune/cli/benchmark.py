"""The verb `benchmark`: speed ratios, measured side by side in one run. Each benchmark is a sub-verb."""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from megaprune.benchmarks.options import (
    ConvertOptions,
    InferenceOptions,
    Options,
    TeacherCacheOptions,
    TrainStepOptions,
)
from megaprune.cli.parser import parse_flags
from megaprune.utils.errors import UsageError
from megaprune.utils.files import write_json
from megaprune.utils.ranks import rank


@dataclass(frozen=True)
class _Benchmark:
    """Module with `measure(options)` and `table(result)`, imported after the options are checked."""

    module: str
    options: type[Options]
    description: str


BENCHMARKS = {
    "train-step": _Benchmark(
        "train_step", TrainStepOptions, "The cost of a search step relative to a plain training step."
    ),
    "convert": _Benchmark("convert", ConvertOptions, "The cost of a conversion relative to copying its bytes."),
    "inference": _Benchmark("inference", InferenceOptions, "The speed of a pruned model relative to its original."),
    "teacher-cache": _Benchmark(
        "teacher_cache", TeacherCacheOptions, "The cost of caching a teacher, and the error of the cache."
    ),
}


def run(argv: Sequence[str], command: str = "") -> None:
    """Run the benchmark named by the first word; print its result and write it to `--output`. Collective.

    Raises:
        MegapruneError: the benchmark can't be run.
        UsageError: there is no such benchmark, or its flags are wrong.
    """
    known = ", ".join(BENCHMARKS)
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: benchmark.py <benchmark> [flags]\n\nbenchmarks: {known}\n\nbenchmark.py <benchmark> --help")
        sys.exit(0)
    if not argv:
        raise UsageError(f"name a benchmark: {known}")
    if argv[0] not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {argv[0]!r}; known: {known}")
    chosen = BENCHMARKS[argv[0]]
    prog = f"benchmark.py {argv[0]}"
    options: Options = parse_flags(argv[1:], [chosen.options], prog, chosen.description, recipes=False)[0]
    options.check()
    module = importlib.import_module(f"megaprune.benchmarks.{chosen.module}")
    result = module.measure(options)
    if rank() == 0:
        print(module.table(result), flush=True)
        if options.output:
            write_json(options.output, result)
            print(f"\nwritten to {options.output}", flush=True)
