import pytest

from megaprune.mcore import parallel


@pytest.fixture(autouse=True)
def in_no_process_group():
    """Leave the process group of other tests, because a simulated rank needs that there is none."""
    parallel.leave()
