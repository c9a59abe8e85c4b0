import gc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Most tests are of CPU processes, several at a time; set before torch is loaded. A run of the tests that need a GPU
# (-m gpu) shows them the devices: CUDA_VISIBLE_DEVICES=0 .venv/bin/python -m pytest -m gpu.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

_PARALLEL = Path(__file__).with_name("parallel")


@pytest.hookimpl(tryfirst=True)  # before -m selects tests by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in tests/parallel, and skip tests whose requirements this machine lacks."""
    reasons = {}
    if not torch.cuda.is_available():
        reasons["gpu"] = "no GPU is visible (the tests hide it unless CUDA_VISIBLE_DEVICES is set)"
    if find_spec("vllm") is None:
        reasons["serving"] = "vLLM is not installed"
    if find_spec("transformer_engine") is None:
        reasons["te"] = "Transformer Engine is not installed (tests/te/build.sh)"
    for item in items:
        if item.path.is_relative_to(_PARALLEL):
            item.add_marker(pytest.mark.parallel)
        for name, reason in reasons.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let one worker run all tests of tests/parallel, which share the results of the processes that they start, and
    never divide a file, because its tests share fixtures.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "parallel" if nodeid.startswith("tests/parallel/") else nodeid.partition("::")[0]

    return ByFile(config, log)


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Keep what is imported out of garbage collection: a run collects several times, and each pass would take 0.4 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Return a function that gives the folder of a tiny model; the same folder for the same arguments."""
    from tests.helpers import tiny  # imported here and below: it loads transformers, which many tests do not need

    made = {}

    def get(family, dtype=torch.float32, max_shard_size="5GB"):
        key = (family, dtype, max_shard_size)
        if key not in made:
            made[key] = tiny.make_model(tmp_path_factory.mktemp(family) / "model", *key)
        return made[key]

    return get


@pytest.fixture(scope="session")
def stored_model(tiny_model, tmp_path_factory):
    """Return a function that gives the folder of a model in another stored layout, by its name in ``stored.MODELS``."""
    from tests.helpers import stored

    made = {}

    def get(name):
        if name not in made:
            family, make = stored.MODELS[name]
            made[name] = make(tiny_model(family), tmp_path_factory.mktemp(name) / "model")
        return made[name]

    return get


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A folder with train.jsonl and valid.jsonl."""
    from tests.helpers import tiny

    return tiny.make_data_folder(tmp_path_factory.mktemp("data"), train_rows=150, valid_rows=15)


@pytest.fixture(scope="session")
def whole_run(tiny_model, tiny_data, tmp_path_factory):
    """Run on one process without interruption."""
    from tests.helpers import tiny

    save = tmp_path_factory.mktemp("whole") / "run"
    tiny.run_here(tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, save))
    return save


@pytest.fixture(scope="module")
def one_process():
    """Megatron's process groups with this process alone."""
    from megaprune.mcore import parallel
    from megaprune.mcore.parallel import ParallelSizes

    parallel.initialize(ParallelSizes())
    yield
    parallel.finish()
