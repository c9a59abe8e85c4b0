"""The cases of all parallel tests, run once for each number of processes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from megaprune.cli import main as cli
from tests.helpers import tiny
from tests.helpers.launch import launch
from tests.parallel.layouts import (
    ENDPOINT_LAYOUTS,
    INTERRUPTED_RUNS,
    LOAD_LAYOUTS,
    MOE_FAMILIES,
    MOE_RUN_LAYOUTS,
    RUN_LAYOUTS,
    SELECT_LAYOUTS,
    SELECTING,
    SHEARED_LAYOUTS,
    STEP_LAYOUTS,
    STORED_LAYOUTS,
    model_layouts,
)

# runs that begin with an imported checkpoint
LOADED = ("moe_tp2_sp", "moe_pp2")
IN_BF16 = ("llama3", "qwen3_moe")


@dataclass
class Results:
    """The folders that the cases of one number of processes left."""

    folder: Path

    def model(self, family, layout):
        return self.folder / f"model-{family}-{layout}"

    def step(self, layout):
        return self.folder / f"step-{layout}"

    def run(self, name):
        return self.folder / f"run-{name}"


@pytest.fixture(scope="session")
def source(tiny_model):
    """Gives a family's model; most in several files, some stored in bf16, the others in fp32."""
    return lambda family: tiny_model(family, torch.bfloat16 if family in IN_BF16 else torch.float32, "200KB")


@pytest.fixture(scope="session")
def results(tiny_model, stored_model, source, tiny_data, tmp_path_factory):
    """Gives the results of a number of processes."""
    launched = {}

    def get(num_processes):
        if num_processes not in launched:
            found = Results(tmp_path_factory.mktemp(f"processes{num_processes}"))
            try:
                launch(
                    num_processes,
                    _cases(num_processes, found, tiny_model, stored_model, source, tiny_data),
                    found.folder,
                )
                launched[num_processes] = found
            except pytest.fail.Exception as failure:
                launched[num_processes] = failure
        if isinstance(launched[num_processes], BaseException):
            raise launched[num_processes]
        return launched[num_processes]

    return get


def _imported(model, folder):
    """The checkpoint of a model."""
    out = folder / "-".join(["imported", model.parent.name])
    if not out.exists():
        assert cli.attempt("convert", ["import", "--hf-model", str(model), "--megatron-path", str(out)]) == (0, None)
    return out


def _cases(num_processes, results, tiny_model, stored_model, source, tiny_data):
    def argv(name, flags):
        return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, results.run(name), *flags)

    def moe_argv(name, flags):
        model = tiny_model("deepseek_v3")
        argv = tiny.moe_prune_argv(model, tiny_data, results.run(name), *flags)
        if name in LOADED:
            argv[argv.index("--hf-model")] = "--load"
            argv[argv.index(str(model))] = str(_imported(model, results.folder))
        return argv

    def select_argv(method, flags, save):
        return tiny.select_argv(tiny_model("qwen3_tied"), tiny_data, save, method, *flags)

    cases = [
        dict(kind="model", hf_model=source(family), sizes=sizes, out=results.model(family, layout))
        for family in (*tiny.FAMILIES, *MOE_FAMILIES)
        for layout, (processes, sizes) in model_layouts(family).items()
        if processes == num_processes
    ]
    cases += [
        dict(kind="model", hf_model=stored_model(name), sizes=sizes, out=results.model(name, layout))
        for name, layouts in STORED_LAYOUTS.items()
        for layout, (processes, sizes) in layouts.items()
        if processes == num_processes
    ]
    cases += [
        dict(kind="mask_gradient", hf_model=source("qwen3_tied"), sizes=sizes, out=results.step(layout))
        for layout, (processes, sizes) in STEP_LAYOUTS.items()
        if processes == num_processes
    ]
    cases += [
        dict(kind="prune", argv=argv(name, flags))
        for name, (processes, flags) in RUN_LAYOUTS.items()
        if processes == num_processes
    ]
    cases += [
        dict(kind="prune", argv=moe_argv(name, flags))
        for name, (processes, flags) in MOE_RUN_LAYOUTS.items()
        if processes == num_processes
    ]
    if num_processes == 2:
        cases += [
            dict(kind="prune", argv=select_argv(method, flags, results.run(f"{method}-{name}")))
            for method in SELECTING
            for name, flags in SELECT_LAYOUTS.items()
        ]
        cases += [
            dict(
                kind="prune",
                argv=tiny.endpoint_argv(tiny_model("qwen3_tied"), tiny_data, results.run(name), *flags),
            )
            for name, flags in ENDPOINT_LAYOUTS.items()
        ]
        cases += [
            dict(
                kind="prune",
                argv=tiny.sheared_argv(tiny_model("qwen3_tied"), tiny_data, results.run(name), *flags),
            )
            for name, flags in SHEARED_LAYOUTS.items()
        ]
        cases += [
            dict(
                kind="load_by_the_core",
                hf_model=tiny_model(family),
                megatron_path=_imported(tiny_model(family), results.folder),
                sizes=sizes,
            )
            for family, sizes in LOAD_LAYOUTS.values()
        ]
        cases += [
            dict(kind="interrupted_prune", stops=[(argv(name, flags), iterations) for flags, iterations in goes])
            for name, goes in INTERRUPTED_RUNS.items()
        ]
    return cases
