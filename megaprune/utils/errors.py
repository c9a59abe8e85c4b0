"""The exceptions of megaprune. Each one ends a command with one line and no traceback."""


class MegapruneError(Exception):
    """A request that can't be fulfilled (exit status 1). The message names the cause and the remedy."""

    exit_status = 1
    # True if every rank raises it: rank 0 then prints the line of a command.
    on_all_ranks = False
    # True if what was finished before the error stays, and the same call goes on from there.
    keeps_progress = False


class UsageError(MegapruneError):
    """An error in the command line or the recipe (exit status 2). The message names the flag."""

    exit_status = 2


class RunStopped(Exception):
    """A run was asked to stop: its progress is saved, and the same call goes on from there.

    Args:
        progressed: whether anything new was saved since the call began.
    """

    def __init__(self, message: str = "", progressed: bool = True) -> None:
        super().__init__(message)
        self.progressed = progressed
