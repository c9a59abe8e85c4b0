"""The request to stop that the flags of a job describe."""

from megaprune.config.schema import RunConfig
from megaprune.utils.stopping import StopRequest

__all__ = ["StopRequest", "stop_request"]


def stop_request(run: RunConfig) -> StopRequest | None:
    """Return the request that `--exit-on-signal` and `--exit-duration-in-mins` ask for."""
    if not run.exit_on_signal and run.exit_duration_in_mins is None:
        return None
    return StopRequest(run.exit_on_signal, run.exit_duration_in_mins)
