"""The verbs of the command line: parse, call."""

from collections.abc import Sequence


def prune(argv: Sequence[str], command: str) -> None:
    """``tools/prune.py``"""
    from megaprune.config import parse_config

    config = parse_config(argv)
    from megaprune.mcore import parallel
    from megaprune.runner import run

    run(config, command)
    parallel.leave()


def cache_teacher(argv: Sequence[str], command: str) -> None:
    """``tools/cache_teacher.py``"""
    from megaprune.training.caching_cli import run

    run(argv)
    from megaprune.mcore import parallel

    parallel.leave()


def convert(argv: Sequence[str], command: str) -> None:
    """``tools/convert.py``"""
    from megaprune.conversion.cli import run

    run(argv)


def evaluate(argv: Sequence[str], command: str) -> None:
    """``tools/evaluate.py``"""
    from megaprune.evaluation.cli import EvaluateConfig, run
    from megaprune.flags import Parser

    parser = Parser(
        [EvaluateConfig], prog="evaluate.py", description="Loss of an HF model, and agreement with a teacher."
    )
    run(parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])


def compare(argv: Sequence[str], command: str) -> None:
    """``tools/compare.py``"""
    from megaprune.comparison.cli import run

    run(argv)


def benchmark(argv: Sequence[str], command: str) -> None:
    """``tools/benchmark.py``"""
    from megaprune.evaluation.benchmark import run

    run(argv)


def preprocess_data(argv: Sequence[str], command: str) -> None:
    """``tools/preprocess_data.py``"""
    from megaprune.preprocessing.cli import run

    run(argv)


def plan(argv: Sequence[str], command: str) -> None:
    """``tools/plan.py``"""
    from megaprune.planning.cli import run

    run(argv)
