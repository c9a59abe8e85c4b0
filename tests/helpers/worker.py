"""Program that torchrun starts for `launch`: every case in turn, with process groups of its own.

Beside the cases (``cases.json``) it leaves, for each by its number, ``N.begun``, ``N.rankR`` with the traceback of a
rank that failed, and ``N.ended`` once all ranks returned from it.
"""

import gc
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

# The other ranks wait for a failed rank; a run would wait for an hour.
_COLLECTIVE_TIMEOUT = timedelta(minutes=2)
# Seconds that the others have to return from a case after one rank failed in it, and after one rank finished it.
_AFTER_FAILURE, _AFTER_SUCCESS = timedelta(seconds=10), timedelta(minutes=3)


class _Ranks:
    """All ranks of this launch: a process group, and a vote that needs none."""

    def __init__(self, notes: Path) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._store = dist.FileStore(str(notes / "store"), self.size)
        self._groups = 0

    def join(self) -> None:
        """Set up the process group."""
        # Under a new prefix, because the addresses of a destroyed group stay in the store.
        store = dist.PrefixStore(f"group{self._groups}", self._store)
        self._groups += 1
        dist.init_process_group(
            device.BACKEND, store=store, rank=self.rank, world_size=self.size, timeout=_COLLECTIVE_TIMEOUT
        )

    def leave(self) -> None:
        """Destroy all groups, in any state that a case left them in."""
        if "megaprune.mcore.parallel" in sys.modules:
            sys.modules["megaprune.mcore.parallel"].leave()
        elif dist.is_initialized():
            dist.destroy_process_group()

    def agree(self, number: int, failed: bool) -> bool | None:
        """Return whether any rank failed in a case, or None if a rank did not return from it."""
        self._store.set(f"case{number}/{self.rank}", "failed" if failed else "passed")
        keys = [f"case{number}/{rank}" for rank in range(self.size)]
        try:
            self._store.wait(keys, _AFTER_FAILURE if failed else _AFTER_SUCCESS)
        except RuntimeError:  # DistStoreError: out of time
            return None
        return any(self._store.get(key) == b"failed" for key in keys)


def main(notes: Path) -> None:
    """Run the cases of a folder."""
    ranks = _Ranks(notes)
    ranks.join()
    for number, case in enumerate(json.loads((notes / "cases.json").read_text())):
        gc.collect()
        gc.freeze()  # a run collects garbage several times, and passing over all that is imported takes 0.4 s
        if ranks.rank == 0:
            (notes / f"{number}.begun").touch()
        text = _run(**case)
        if text is not None:
            aside = notes / f"aside{number}.{ranks.rank}"
            aside.write_text(text)
            aside.rename(notes / f"{number}.rank{ranks.rank}")
        failed = ranks.agree(number, text is not None)
        if failed is None:
            os._exit(1)
        if ranks.rank == 0:
            (notes / f"{number}.ended").touch()
        if failed or not dist.is_initialized():
            ranks.leave()
            ranks.join()
    ranks.leave()


def _run(kind: str, **arguments: Any) -> str | None:
    """Run one case. Return the traceback if it failed."""
    module, _, function = kind.rpartition(".")
    try:
        getattr(importlib.import_module(f"tests.parallel.{module or 'cases'}"), function)(**arguments)
    except BaseException:
        return traceback.format_exc()
    return None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
