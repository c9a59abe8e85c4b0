"""What torchrun starts: every case in turn, with process groups of its own."""

import importlib
import json
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch.distributed as dist  # noqa: E402

from megaprune import device  # noqa: E402


def main(work: list[dict[str, Any]]) -> None:
    # A rank that fails leaves the others waiting: not for the hour that a run would.
    dist.init_process_group(device.BACKEND, timeout=timedelta(minutes=2))
    for case in work:
        kind = case.pop("kind")
        try:
            module, _, function = kind.rpartition(".")
            getattr(importlib.import_module(f"tests.parallel.{module or 'cases'}"), function)(**case)
        except BaseException:
            print(f"rank {dist.get_rank()}: {kind} {case} failed:\n{traceback.format_exc()}", flush=True)
            os._exit(1)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
