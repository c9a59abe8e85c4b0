"""Runs of which every rank records what is in memory at their transitions."""

import json
from pathlib import Path

from megaprune.mcore import parallel
from tests.helpers import tiny
from tests.helpers.living import watched


def freed(argv: list[str], out: str) -> None:
    """Run a job, and write to ``out.RANK`` the moments and the numbers of tensors that were built."""
    with watched() as living:
        tiny.run_here(argv)
    built = {name: len(tensors) for name, tensors in living.tensors.items()}
    Path(f"{out}.{parallel.rank()}").write_text(json.dumps([living.moments, built]))
