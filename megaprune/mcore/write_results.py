"""Results of the processes that write a checkpoint, in memory that they share with the process that started them."""

import os
import pickle
import queue
import tempfile
from typing import Any


class WriteResults:
    """Queue of one entry between a process and those that it forks, or within a process.

    Megatron-Core reports through the queue of a manager process. The process takes seconds to start and 400 MB per
    rank, and it survives when its rank is killed. A pipe would block a writer whose results exceed its capacity,
    because they are read only after the writer has ended.
    """

    def __init__(self) -> None:
        # without a name, so that nothing is left of it
        self._file = (
            os.fdopen(os.memfd_create("write-results"), "w+b", buffering=0)
            if hasattr(os, "memfd_create")
            else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        )

    def put(self, results: Any) -> None:
        """Store the results."""
        self._file.seek(0)
        self._file.truncate()
        left = memoryview(pickle.dumps(results))
        while left:
            left = left[self._file.write(left) :]

    def get_nowait(self) -> Any:
        """Return the results and remove them.

        Raises:
            queue.Empty: there are none.
        """
        self._file.seek(0)
        data = self._file.read()
        if not data:
            raise queue.Empty
        self._file.seek(0)
        self._file.truncate()
        return pickle.loads(data)
