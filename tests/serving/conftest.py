import os
from importlib.util import find_spec

import pytest

# vLLM reads these when it is imported. In one process, so that a failure shows its traceback; no calls home; and its
# small functions are not compiled, which takes minutes on few cores.
_SETTINGS = dict(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1")
_SETTINGS |= dict(HF_HUB_OFFLINE="1", TORCH_COMPILE_DISABLE="1")
if find_spec("vllm") is not None:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)

_ROWS = pytest.StashKey[list[str]]()


@pytest.fixture
def record_row(request):
    """Return a function that adds a row to the table at the end of the tests."""
    rows = request.config.stash.setdefault(_ROWS, [])
    return lambda *cells: rows.append(f"| {' | '.join(cells)} |")


def pytest_terminal_summary(terminalreporter, config):
    """Print the table of what was served, in Markdown."""
    if rows := config.stash.get(_ROWS, []):
        terminalreporter.section("served by vLLM")
        head = "| family | same tokens, source | export | largest difference of log-probability, source | export |"
        terminalreporter.write_line("\n".join([head, "| --- | --- | --- | ---: | ---: |", *rows]))
