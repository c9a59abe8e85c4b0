"""Worker processes that take batches and return results in order.

They are forked from a new Python process that has imported what they need. The process of the caller is not forked,
because threads of its tokenizer, of Arrow or of a GPU would not survive it; and unlike `multiprocessing`'s other start
methods, this one does not run the caller's script again, so that calls of the API need no guard.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

from megaprune.utils.errors import MegapruneError

T = TypeVar("T")
# Batches per worker that are in progress or wait for their turn. The limit bounds memory if one batch takes long.
_BATCHES_AHEAD = 4
_PRELOADED = ("megaprune.data.parallel_encoder", "transformers.models.auto.tokenization_auto")
# Launchers describe the caller's place among others by these; a worker has none.
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID")
_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class WorkerDied(MegapruneError):
    """A worker process ended before its work did."""

    keeps_progress = True


def available_cpus() -> int:
    """Return the number of cores that this process may use: by its affinity, and by Slurm where it sets none."""
    cores = len(os.sched_getaffinity(0))
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(cores, int(given)) if given.isdecimal() and int(given) else cores


def in_order(
    batches: Iterable[Any],
    begin: Callable[..., Callable[[Any], T]],
    arguments: tuple[Any, ...],
    workers: int,
    flag: str,
) -> Generator[T]:
    """Yield the results of batches in their order.

    Args:
        begin: called with the arguments in each worker; returns the function that turns a batch into its result.
        flag: sets the number of workers, for the error message.

    Raises:
        MegapruneError: a worker raised it for the first batch that failed, or a worker died.
    """
    pending: deque[Future[T]] = deque()
    pool = _Pool(workers, begin, arguments, flag)
    try:
        for batch in batches:
            pending.append(pool.submit(batch))
            if len(pending) >= _BATCHES_AHEAD * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()


class _Pool:
    """Worker processes, and a thread for each that waits for its results."""

    def __init__(self, workers: int, begin: Callable[..., Any], arguments: tuple[Any, ...], flag: str) -> None:
        pairs = [Pipe() for _ in range(workers)]
        theirs = [other.fileno() for _, other in pairs]
        code = f"import sys; sys.path[:] = {sys.path!r}; from megaprune.data.pool import serve; serve({theirs!r})"
        environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment | _ENVIRONMENT,
            stdin=subprocess.DEVNULL,
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C reaches the caller alone
        )
        self._flag = flag
        self._mine = [mine for mine, _ in pairs]
        self._idle: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        for mine, other in pairs:
            other.close()
            self._idle.put(mine)
        self._setup = pickle.dumps((begin, arguments))
        self._begun: set[Connection] = set()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="workers")

    def submit(self, batch: Any) -> Future[Any]:
        """Let the next idle worker turn a batch into its result."""
        return self._threads.submit(self._ask, batch)

    def close(self) -> None:
        """Wait for the batches in progress, and end the workers."""
        self._threads.shutdown(cancel_futures=True)
        for connection in self._mine:
            connection.close()
        self._process.wait()

    def _ask(self, batch: Any) -> Any:
        worker = self._idle.get()
        try:
            if worker not in self._begun:
                worker.send_bytes(self._setup)
                self._begun.add(worker)
            worker.send(batch)
            result, error = worker.recv()
        except (EOFError, OSError):
            raise WorkerDied(
                f"a worker process died, perhaps because memory ran out: run again with fewer {self._flag}"
            ) from None
        finally:
            self._idle.put(worker)
        if error is not None:
            raise error
        return result


def serve(descriptors: list[int]) -> None:
    """Fork a worker for each connection, and wait until all of them have ended. This runs in the new process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # those of a job; the caller ends its workers
        signal.signal(number, signal.SIG_IGN)
    for name in _PRELOADED:
        __import__(name)
    for descriptor in descriptors:
        if os.fork() == 0:
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            _work(Connection(descriptor))
            return
    for descriptor in descriptors:
        os.close(descriptor)
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _work(caller: Connection) -> None:
    """Answer batches until the caller closes the connection, or has ended."""
    handle: Callable[[Any], Any] | None = None
    with suppress(EOFError, OSError):
        begin, arguments = pickle.loads(caller.recv_bytes())
        while True:
            batch = caller.recv()
            try:
                if handle is None:
                    handle = begin(*arguments)
                answer = pickle.dumps((handle(batch), None))
            except MegapruneError as error:
                answer = pickle.dumps((None, error))
            except Exception as error:
                told = MegapruneError(
                    f"a worker process failed: {type(error).__name__}: {' '.join(str(error).split())}"
                )
                answer = pickle.dumps((None, told))
            caller.send_bytes(answer)
