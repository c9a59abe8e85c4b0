import pytest

from megaprune.mcore import parallel


@pytest.fixture(autouse=True)
def in_no_process_group():
    """Other tests of this process may have left it in one; a rank on paper can't be."""
    parallel.leave()
