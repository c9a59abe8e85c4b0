"""The console command ``megaprune <verb>``; each file in tools/ is one verb of it."""

import importlib
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from megaprune.cli.console import console
from megaprune.utils import failure
from megaprune.utils.disk import disk_error, explain
from megaprune.utils.errors import MegapruneError, RunStopped, UsageError
from megaprune.utils.ranks import forget_stale_variables, rank, world_size

VERBS = {
    "prune": "prune and heal a model",
    "cache-teacher": "store a teacher's logits for all training data",
    "convert": "convert HF safetensors to a Megatron-Core checkpoint and back",
    "evaluate": "compute an HF model's loss, perplexity and agreement with a teacher",
    "compare": "compare several methods on one model at equal budgets",
    "benchmark": "measure speed ratios side by side",
    "generate-data": "write text or chats with the model itself",
    "push": "push a pruned model and its card to the Hugging Face Hub",
    "preprocess-data": "convert text or chat to Megatron's indexed datasets",
    "plan": "compute every rank's layers, parameters and memory without weights or accelerators",
}

# Verbs whose processes may also be started by another launcher than torchrun.
_JOBS = ("prune", "cache-teacher", "compare")

# Seconds that a rank which fails before the ranks join waits for rank 0 to report the same error and the launcher to
# terminate all ranks; and seconds that a rank waits to be terminated after another has reported the error.
_WAIT_FOR_FIRST_RANK_SECONDS, _WAIT_FOR_LAUNCHER_SECONDS = 15, 5


def main(verb: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a verb and exit: with 0, or with 1 or 2 and one line on stderr (see `megaprune.utils.errors`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if verb is None:
        if not words or words[0] not in VERBS:
            _usage(words)
        verb = words.pop(0)
    failure.end_together()
    try:
        status, line, on_all_ranks = _outcome(verb, words)
    except Exception as error:
        if world_size() == 1:
            raise
        line = f"{verb}: error: rank {rank()}: {type(error).__name__}: {' '.join(str(error).split())}"
        _fail(1, line, traceback.format_exc())
    if line is not None:
        if on_all_ranks and rank() != 0:  # rank 0 prints the line, which ends this process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(_WAIT_FOR_FIRST_RANK_SECONDS)
        _fail(status, line)


def attempt(verb: str, words: Sequence[str]) -> tuple[int, str | None]:
    """Run a verb. Return the exit status and, after an error, its line."""
    status, line, _ = _outcome(verb, words)
    return status, line


def _outcome(verb: str, words: Sequence[str]) -> tuple[int, str | None, bool]:
    """Run a verb. Return the exit status and, after an error, its line and whether every rank has the same error."""
    _quieten()
    try:
        forget_stale_variables(verb in _JOBS)
        module = importlib.import_module(f"megaprune.cli.{verb.replace('-', '_')}")
        with console():
            module.run(words, shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
    except RunStopped as stop:
        if stop.progressed or rank() != 0:
            return 0, None, False
        # A job that queues itself again would never end.
        return 1, f"{verb}: error: {stop}, before anything new was saved: give it more time", False
    except KeyboardInterrupt:
        line = f"{verb}: interrupted; the same command continues a run from its last checkpoint"
        return 128 + signal.SIGINT, line, False
    except MegapruneError as error:
        return error.exit_status, f"{verb}: error: {' '.join(str(error).split())}", error.on_all_ranks
    except Exception as error:
        met = disk_error(error)  # while writing a report or a table, for example
        if met is None:
            raise
        return MegapruneError.exit_status, f"{verb}: error: {' '.join(explain(met).split())}", False
    return 0, None, False


def _usage(words: Sequence[str]) -> NoReturn:
    if words and words[0] not in ("-h", "--help"):
        _fail(UsageError.exit_status, f"megaprune: error: unknown verb {words[0]!r}; known: {', '.join(VERBS)}")
    print("usage: megaprune <verb> [flags]\n")
    for verb, description in VERBS.items():
        print(f"  {verb:<17}{description}")
    print("\nmegaprune <verb> --help shows the flags of a verb.")
    sys.exit(0)


def _fail(status: int, line: str, details: str = "") -> NoReturn:
    """Exit and terminate the other ranks; one rank prints the reason.

    Args:
        details: text before the line: the traceback of an unexpected error, which may occur on this rank alone.
    """
    first = failure.claim(status, line) if world_size() > 1 else True
    if first is None:
        # The other ranks could not be notified; the launcher terminates them when this process ends. An error before
        # the ranks join occurs on every rank, and rank 0 must exit first, or its line is lost.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if rank() != 0 and not details:
            time.sleep(_WAIT_FOR_FIRST_RANK_SECONDS)
    if first is False:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_WAIT_FOR_LAUNCHER_SECONDS)
    else:
        print(details + line, file=sys.stderr, flush=True)
    # Not sys.exit: the process groups' threads could keep a failed rank waiting for the others.
    sys.stdout.flush()
    os._exit(status)


def _quieten() -> None:
    """Silence libraries whose messages would hide those of the run."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    threading.excepthook = _on_thread_error


def _on_thread_error(args: threading.ExceptHookArgs) -> None:
    """Silence disk errors in the thread of TensorBoard's writer, which raises them again at the next write."""
    if args.exc_value is None or disk_error(args.exc_value) is None:
        threading.__excepthook__(args)
