"""The commands in the documentation: what they name exists, and those that can run on the demo's model run."""

import signal

import pytest

from megaprune.cli import main as cli
from megaprune.mcore import parallel
from megaprune.utils.errors import MegapruneError
from tests.helpers.documents import PAGES, ROOT, Command, Wrong, check, commands_of, flags_of, known_flags

TEXTS = {str(page): (ROOT / page).read_text() for page in PAGES}
COMMANDS = [command for page, text in TEXTS.items() for command in commands_of(page, text)]
# Of torchrun, pytest, Megatron-LM, vLLM and the scripts in examples/.
FOREIGN = {
    *("--nproc-per-node", "--nnodes", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint", "--nodes", "--cov"),
    *("--data-path", "--tokenizer-type", "--tokenizer-hf-include-special-tokens", "--append-eod"),
    *("--dist-ckpt-strictness", "--scheme", "--samples"),
    *("--enable-lora", "--lora-modules", "--speculative-config"),
}


def test_the_documentation_has_commands():
    assert {"README.md", "docs/data.md", "docs/conversion.md"} <= {command.page for command in COMMANDS}
    assert {"prune", "plan", "convert", "compare"} <= {command.verb[0] for command in COMMANDS if command.verb}


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_names_what_exists(command):
    check(command)


def test_flags_in_the_text_exist():
    known = known_flags() | FOREIGN
    assert "--train-iters" in known and "--megatron-path" in known and "--repeats" in known
    unknown = {page: sorted(flags_of(text) - known) for page, text in TEXTS.items()}
    assert {page: flags for page, flags in unknown.items() if flags} == {}


@pytest.mark.parametrize(
    "line, said",
    [
        ("torchrun --nproc-per-node 2 tools/prune.py --hf-model m --no-such-flag 3", "--no-such-flag"),
        ("torchrun --no-such-flag tools/prune.py --hf-model m", "--no-such-flag"),
        ("python tools/plan.py --hf-model m \\\n  --world-sizes 8", "--world-sizes"),
        ("python tools/convert.py import --hf-model m --megatron-path p --quick", "--quick"),
        ("python tools/benchmark.py train-step --hf-model m", "--hf-model"),
        ("megaprune prune --dry-runs ...", "--dry-runs"),
        ("megaprune prunes --hf-model m", "prunes"),
        ("python tools/prunes.py --hf-model m", "prunes"),
        (
            "megaprune prune --hf-model m --train-data d --save r --prune-ratio 0.5 --train-iters -1",
            "--train-iters",
        ),
        ("python tools/prune.py --config examples/demo/missing.yaml", "missing.yaml"),
        ("python examples/quantize/quantize.py --hf-models m", "--hf-models"),
        ("sbatch --nodes 4 examples/slurm/prune.sbatch examples/recipes/missing.yaml", "missing.yaml"),
        ("pip install 'megaprune[speed]'", "speed"),
        ("make tests", "tests"),
        ("mkae test", "mkae"),
    ],
)
def test_wrong_commands_are_found(line, said):
    [command] = commands_of("page.md", f"Text.\n\n```bash\n{line}   # a comment\n```\n")
    with pytest.raises((Wrong, MegapruneError), match=said):
        check(command)


def test_commands_are_found_in_blocks_and_in_prose():
    block = "    ```bash\n    export A=1\n    B=2 python x.py \\\n      --c 'd e'\n    ```\n"
    text = f"`make demo` and\n\n{block}`python y.py --f`\n"
    found = [(command.line, command.words) for command in commands_of("page.md", text)]
    assert found == [(5, ("python", "x.py", "--c", "d e")), (1, ("make", "demo")), (8, ("python", "y.py", "--f"))]


DEMO = "examples/demo"
# What is written over the flags of a documented command (the last one counts), so that it runs on the demo's model, in
# this process and in seconds. {tmp} is a folder of its own.
SMALL_RUN = (
    f"--hf-model {DEMO}/teacher --train-data {DEMO}/valid.jsonl --save {{tmp}}/run --num-layers-to-prune 4 "
    "--seq-length 64 --global-batch-size 8 --tensor-model-parallel-size 1 --sequence-parallel false "
    "--pipeline-model-parallel-size 1 --expert-model-parallel-size 1 --dry-run"
)
OVERRIDES = {
    "prune": SMALL_RUN,
    "plan": (
        f"--hf-model {DEMO}/teacher --seq-length 64 --tensor-model-parallel-size 2 --expert-model-parallel-size 1 "
        "--num-layers-to-prune 4 --output {tmp}/plan.json"
    ),
    "cache-teacher": (
        f"--hf-model {DEMO}/teacher --train-data {DEMO}/valid.jsonl --seq-length 64 --tensor-model-parallel-size 1 "
        "--sequence-parallel false --output {tmp}/cache --dry-run"
    ),
    "convert import": f"--hf-model {DEMO}/teacher --megatron-path {{tmp}}/megatron",
    "convert export": "--megatron-path {tmp}/megatron --hf-path {tmp}/hf",
    "convert verify": f"--hf-model {DEMO}/teacher --hf-path {{tmp}}/hf",
    "evaluate": f"--hf-model {DEMO}/teacher --seq-length 32 --limit 2 --output {{tmp}}/evaluation.json",
    "generate-data": (
        f"--hf-model {DEMO}/teacher --prompts {DEMO}/valid.jsonl --num-samples 2 --max-new-tokens 3 --prompt-tokens 4 "
        "--output {tmp}/written.jsonl"
    ),
    "preprocess-data": (
        f"--input {DEMO}/valid.jsonl --tokenizer {DEMO}/teacher --output-prefix {{tmp}}/data --workers 1"
    ),
    "benchmark teacher-cache": "--windows 2 --seq-length 16 --micro-batch-size 2 --repeats 1",
}


def runnable(command: Command) -> str | None:
    """Return the key of a command's overrides."""
    if command.verb is None or not command.whole:
        return None
    verb, words = command.verb
    key = " ".join([verb, *words[:1]]) if verb in ("convert", "benchmark") else verb
    return key if key in OVERRIDES else None


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The folder in which the commands run one after another: `convert export` takes what `convert import` left."""
    return tmp_path_factory.mktemp("documented")


RUNNABLE = [command for command in COMMANDS if runnable(command)]


def test_every_kind_of_command_runs():
    assert {runnable(command) for command in RUNNABLE} >= OVERRIDES.keys() - {"evaluate"}


@pytest.mark.parametrize("command", RUNNABLE, ids=str)
def test_command_runs_on_the_demo(command, workplace, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, words = command.verb
    over = OVERRIDES[runnable(command)].format(tmp=workplace).split()
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.attempt(verb, [*words, *over]) == (0, None)
    finally:
        parallel.leave()
        signal.signal(signal.SIGTERM, before)
