"""The verbs of the command line: parse, call."""

from collections.abc import Sequence


def prune(argv: Sequence[str], command: str) -> None:
    """``tools/prune.py``"""
    from megaprune.config.schema import parse_config

    config = parse_config(argv)
    from megaprune.mcore import parallel
    from megaprune.pruning.runner import run

    run(config, command)
    parallel.leave()


def cache_teacher(argv: Sequence[str], command: str) -> None:
    """``tools/cache_teacher.py``"""
    from megaprune.cli.cache_teacher import run

    run(argv)
    from megaprune.mcore import parallel

    parallel.leave()


def convert(argv: Sequence[str], command: str) -> None:
    """``tools/convert.py``"""
    from megaprune.cli.convert import run

    run(argv)


def evaluate(argv: Sequence[str], command: str) -> None:
    """``tools/evaluate.py``"""
    from megaprune.cli.evaluate import EvaluateConfig, run
    from megaprune.cli.parser import Parser

    parser = Parser(
        [EvaluateConfig], prog="evaluate.py", description="Loss of an HF model, and agreement with a teacher."
    )
    run(parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)[0])


def compare(argv: Sequence[str], command: str) -> None:
    """``tools/compare.py``"""
    from megaprune.cli.compare import run

    run(argv)


def benchmark(argv: Sequence[str], command: str) -> None:
    """``tools/benchmark.py``"""
    from megaprune.cli.benchmark import run

    run(argv)


def preprocess_data(argv: Sequence[str], command: str) -> None:
    """``tools/preprocess_data.py``"""
    from megaprune.cli.preprocess_data import run

    run(argv)


def plan(argv: Sequence[str], command: str) -> None:
    """``tools/plan.py``"""
    from megaprune.cli.plan import run

    run(argv)
