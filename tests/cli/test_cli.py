"""The command line: help, exit statuses, and errors of one line on stderr."""

import dataclasses
import importlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megaprune.cli import main as cli
from megaprune.cli import prune
from megaprune.config.schema import GROUPS
from megaprune.utils.errors import MegapruneError, UsageError
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main(monkeypatch, capfd):
    """Run the command line in this process; return its exit status, stdout and stderr."""

    def run(verb, argv):
        def leave(status):
            raise SystemExit(status)

        monkeypatch.setattr(cli.os, "_exit", leave)
        status = 0
        try:
            cli.main(verb, argv)
        except SystemExit as exited:
            status = exited.code
        return status, *capfd.readouterr()

    return run


def verb_that_raises(error):
    def verb(argv, command):
        raise error

    return verb


def test_verbs_have_a_function_and_a_tool():
    tools = {path.stem.replace("_", "-") for path in ROOT.glob("tools/*.py")}
    assert set(cli.VERBS) == tools
    modules = [importlib.import_module(f"megaprune.cli.{verb.replace('-', '_')}") for verb in cli.VERBS]
    assert all(callable(module.run) for module in modules)


def test_prune_help_lists_every_flag_in_its_group(main):
    status, out, err = main("prune", ["--help"])
    assert (status, err) == (0, "")
    for group in GROUPS:
        section = out.partition(f"\n{group._argument_group_name}:\n")[2].partition("\n\n")[0]
        for field in dataclasses.fields(group):
            assert f"\n  --{field.name.replace('_', '-')}" in "\n" + section, f"{field.name} in {group}"
    assert "--config" in out
    assert not re.search("--[a-z-]+_", out), "each flag stands there once, with dashes"


def test_evaluate_help(main):
    status, out, err = main("evaluate", ["--help"])
    assert (status, err) == (0, "")
    assert "--teacher" in out and "--hf-model" in out


@pytest.mark.parametrize("verb", ["prune", "evaluate"])
@pytest.mark.parametrize("words", [["--no-such-flag", "3"], ["--no-such-flag=3"], ["stray"], ["--hf-model"]])
def test_unknown_flags(main, verb, words):
    status, out, err = main(verb, words)
    assert (status, out) == (2, "")
    assert err.startswith(f"{verb}: error: ") and err.count("\n") == 1


def test_close_flags_are_suggested(main):
    assert main("prune", ["--num-layers-prune", "3"])[2] == (
        "prune: error: unknown argument '--num-layers-prune': did you mean --num-layers-to-prune?\n"
    )


def test_console_command(main):
    for words in ([], ["-h"], ["--help"]):
        status, out, err = main(None, words)
        assert (status, err) == (0, "")
        assert all(f"  {verb} " in out for verb in cli.VERBS)
    status, out, err = main(None, ["prunne", "--lr", "3"])
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("megaprune: error: unknown verb 'prunne'; known: prune, ")
    assert main(None, ["prune", "--lr"]) == main("prune", ["--lr"])


def test_sys_argv_is_the_default(main, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megaprune", "prune", "--lr", "fast"])
    assert main(None, None) == (2, "", "prune: error: argument --lr: invalid float value: 'fast'\n")


@pytest.mark.parametrize("error, status", [(MegapruneError("no such\n  thing"), 1), (UsageError("no such  thing"), 2)])
def test_errors_are_one_line(main, monkeypatch, error, status):
    monkeypatch.setattr(prune, "run", verb_that_raises(error))
    assert main("prune", []) == (status, "", "prune: error: no such thing\n")


def test_verbs_get_their_words_and_the_command_line(main, monkeypatch):
    got = []
    monkeypatch.setattr(prune, "run", lambda argv, command: got.extend([argv, command]))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/megaprune", "prune", "--save", "a folder"])
    assert main(None, None) == (0, "", "")
    assert got == [["--save", "a folder"], "megaprune prune --save 'a folder'"]


def test_ctrl_c_ends_in_one_line(main, monkeypatch):
    monkeypatch.setattr(prune, "run", verb_that_raises(KeyboardInterrupt()))
    status, out, err = main("prune", [])
    assert (status, out, err.count("\n")) == (130, "", 1)
    assert err.startswith("prune: interrupted")


def test_other_exceptions_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(prune, "run", verb_that_raises(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main("prune", [])


def test_other_ranks_wait_for_the_first_to_say_it(main, monkeypatch):
    """Before a process group exists, an error of all ranks is printed once. An error of one rank is printed by that
    rank, after it has waited for the first."""
    waited, handlers = [], []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.signal, "signal", lambda *args: handlers.append(args))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert main("prune", ["--no-such-flag"])[2].count("\n") == 1
    assert waited == [15]
    assert handlers == [(signal.SIGTERM, signal.SIG_DFL)], "a launcher must be able to end the wait"
    monkeypatch.setenv("RANK", "0")
    assert main("prune", ["--no-such-flag"])[2].count("\n") == 1
    assert waited == [15]


@pytest.mark.parametrize("is_first", [True, False])
def test_of_several_ranks_that_fail_the_first_says_why(main, monkeypatch, is_first):
    claimed, waited = [], []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    monkeypatch.setattr(cli.signal, "signal", lambda *args: None)
    monkeypatch.setattr(cli.failure, "claim", lambda *args: claimed.append(args) or is_first)
    monkeypatch.setattr(prune, "run", verb_that_raises(RuntimeError("a bug")))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a-run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    status, out, err = main("prune", [])
    assert (status, out) == (1, "")
    assert claimed == [(1, "prune: error: rank 1: RuntimeError: a bug")]
    if is_first:
        assert err.startswith("Traceback") and err.endswith("prune: error: rank 1: RuntimeError: a bug\n")
    else:
        assert err == "" and waited == [5]


def tool(*words):
    return subprocess.run(
        [sys.executable, *map(str, words)], env=tiny.environment(), capture_output=True, text=True, timeout=120
    )


def test_the_script_itself():
    done = tool(ROOT / "tools" / "prune.py", "--no-such-flag")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "prune: error: unknown argument '--no-such-flag': see --help\n"


def test_the_installed_command():
    done = tool(Path(sys.executable).with_name("megaprune"), "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: megaprune <verb> [flags]")
