"""The two ways in which megaprune refuses: each ends a tool with one clear line and no traceback."""


class MegapruneError(Exception):
    """What was asked can't be done (exit status 1). The message names the culprit and the remedy."""

    exit_status = 1


class UsageError(MegapruneError):
    """The command line or the recipe is wrong (exit status 2). The message names the flag."""

    exit_status = 2


class RunStopped(Exception):
    """A run was asked to stop: its checkpoint is saved, and the same call goes on from there."""
