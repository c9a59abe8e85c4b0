"""Cases of all parallel tests, run once for each number of processes."""

import pytest
import torch

from megaprune.cli import main as cli
from tests.helpers import mtp, tiny
from tests.helpers.launch import Launched, launch_cases
from tests.parallel import loss_cases
from tests.parallel.layouts import (
    ENDPOINT_LAYOUTS,
    FREED_LAYOUTS,
    FULL_TRAINING,
    HEALED_LAYOUTS,
    HIDDEN_LAYOUTS,
    INTERRUPTED_RUNS,
    LOAD_LAYOUTS,
    MOE_FAMILIES,
    MOE_RUN_LAYOUTS,
    MTP_LAYOUTS,
    ROUNDS_LAYOUTS,
    RUN_LAYOUTS,
    SELECT_LAYOUTS,
    SELECTING,
    SHEARED_LAYOUTS,
    STEP_LAYOUTS,
    STITCH_LAYOUTS,
    STORED_LAYOUTS,
    model_layouts,
)

# runs that start from an imported checkpoint
LOADED = ("moe_tp2_sp", "moe_pp2")
IN_BF16 = ("llama3", "qwen3_moe")


@pytest.fixture(scope="session")
def source(tiny_model):
    """Return a function that gives a family's model, most in several files, some in bf16, others in fp32."""
    return lambda family: tiny_model(family, torch.bfloat16 if family in IN_BF16 else torch.float32, "200KB")


@pytest.fixture(scope="session")
def mtp_model(tmp_path_factory):
    """Return a model with a multi-token-prediction layer."""
    return mtp.make_model(tmp_path_factory.mktemp("mtp"))


@pytest.fixture(scope="session")
def results(tiny_model, stored_model, source, mtp_model, tiny_data, tmp_path_factory):
    """Return a function that gives the results for a number of processes. A failed case fails only its own tests."""
    launched = {}

    def get(num_processes) -> Launched:
        if num_processes not in launched:
            folder = tmp_path_factory.mktemp(f"processes{num_processes}")
            cases = _cases(num_processes, folder, tiny_model, stored_model, source, mtp_model, tiny_data)
            launched[num_processes] = launch_cases(num_processes, cases, folder)
        return launched[num_processes]

    return get


def _imported(model, folder):
    """Return the checkpoint of a model."""
    out = folder / "-".join(["imported", model.parent.name])
    if not out.exists():
        assert cli.attempt("convert", ["import", "--hf-model", str(model), "--megatron-path", str(out)]) == (0, None)
    return out


def _cases(num_processes, folder, tiny_model, stored_model, source, mtp_model, tiny_data):
    """Return the cases for a number of processes, each named after its output in the folder."""

    def argv(name, flags):
        return tiny.prune_argv(tiny_model("qwen3_tied"), tiny_data, folder / name, *flags)

    def moe_argv(layout, flags):
        model = tiny_model("deepseek_v3")
        argv = tiny.moe_prune_argv(model, tiny_data, folder / f"run-{layout}", *flags)
        if layout in LOADED:
            argv[argv.index("--hf-model")] = "--load"
            argv[argv.index(str(model))] = str(_imported(model, folder))
        return argv

    def of_layouts(layouts):
        return {layout: given for layout, (processes, given) in layouts.items() if processes == num_processes}

    cases = {
        name: dict(kind="model", hf_model=source(family), sizes=sizes, out=folder / name)
        for family in (*tiny.FAMILIES, *MOE_FAMILIES)
        for layout, sizes in of_layouts(model_layouts(family)).items()
        for name in [f"model-{family}-{layout}"]
    }
    for stored, layouts in STORED_LAYOUTS.items():
        for layout, sizes in of_layouts(layouts).items():
            out = folder / f"model-{stored}-{layout}"
            cases[out.name] = dict(kind="model", hf_model=stored_model(stored), sizes=sizes, out=out)
    for layout, sizes in of_layouts(STEP_LAYOUTS).items():
        out = folder / f"step-{layout}"
        cases[out.name] = dict(kind="mask_gradient", hf_model=source("qwen3_tied"), sizes=sizes, out=out)
    for kind, layouts, model in (
        ("hidden_states", HIDDEN_LAYOUTS, source("qwen3_tied")),
        ("multi_token", MTP_LAYOUTS, mtp_model),
    ):
        for layout, (processes, sizes, *stages, recompute) in layouts.items():
            if processes == num_processes:
                out = folder / f"{kind}-{layout}"
                case = dict(kind=f"loss_cases.{kind}", hf_model=model, sizes=sizes, stages=stages, out=out)
                cases[out.name] = case | dict(recompute=recompute)
    for layout, flags in of_layouts(RUN_LAYOUTS).items():
        cases[f"run-{layout}"] = dict(kind="prune", argv=argv(f"run-{layout}", flags))
    for layout, flags in of_layouts(MOE_RUN_LAYOUTS).items():
        cases[f"run-{layout}"] = dict(kind="prune", argv=moe_argv(layout, flags))
    return cases | (_cases_of_two(folder, argv, tiny_model, mtp_model, tiny_data) if num_processes == 2 else {})


def _cases_of_two(folder, argv, tiny_model, mtp_model, tiny_data):
    """Return the cases that run only on two processes."""
    model, cases = tiny_model("qwen3_tied"), {}
    for method, own in SELECTING.items():
        for layout, flags in SELECT_LAYOUTS.items():
            name = f"run-{method}-{layout}"
            selecting = tiny.select_argv(model, tiny_data, folder / name, method, *own, *flags)
            cases[name] = dict(kind="prune_any_candidate", argv=selecting)
    short_runs = (
        (ENDPOINT_LAYOUTS, tiny.endpoint_argv),
        (SHEARED_LAYOUTS, tiny.sheared_argv),
        (ROUNDS_LAYOUTS, tiny.rounds_argv),
        (HEALED_LAYOUTS, tiny.healed_argv),
    )
    for layouts, argv_of in short_runs:
        for layout, flags in layouts.items():
            save = folder / f"run-{layout}"
            cases[save.name] = dict(kind="prune", argv=argv_of(model, tiny_data, save, *flags))
    for layout, flags in FREED_LAYOUTS.items():
        out, short = folder / f"freed-{layout}", ("--train-iters", "3", "--search-iters", "2", "--lr-warmup-iters", "0")
        freed = tiny.prune_argv(model, tiny_data, folder / f"run-freed-{layout}", *short, *flags)
        cases[out.name] = dict(kind="memory_cases.freed", argv=freed, out=out)
    for layout, (family, gone, flags) in STITCH_LAYOUTS.items():
        save = folder / f"run-{layout}"
        cases[save.name] = dict(
            kind="prune", argv=tiny.stitched_argv(tiny_model(family), tiny_data, save, gone, *flags)
        )
    for name, (family, sizes) in LOAD_LAYOUTS.items():
        source = tiny_model(family)
        cases[f"load-{name}"] = dict(
            kind="load_by_the_core", hf_model=source, megatron_path=_imported(source, folder), sizes=sizes
        )
    for name, (family, sizes) in FULL_TRAINING.items():
        out = folder / f"full_training-{name}"
        cases[out.name] = dict(kind="loss_cases.full_training", hf_model=tiny_model(family), sizes=sizes, out=out)
    stops = [(loss_cases.argv(mtp_model, tiny_data, folder / "losses", *flags), end) for flags, end in loss_cases.STOPS]
    cases["losses"] = dict(kind="interrupted_prune", stops=stops)
    for layout, goes in INTERRUPTED_RUNS.items():
        stops = [(argv(f"run-{layout}", flags), iterations) for flags, iterations in goes]
        cases[f"run-{layout}"] = dict(kind="interrupted_prune", stops=stops)
    return cases
