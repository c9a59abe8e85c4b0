"""Rank and world size in the environments of different launchers."""

import os

import pytest

from megaprune.cli import main as cli
from megaprune.utils import ranks
from megaprune.utils.errors import UsageError

LEFT = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3"}
RENDEZVOUS = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}
LAUNCHERS = {"SLURM_PROCID": "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_LOCAL_RANK"}
PLACED = {"RANK": "3", "WORLD_SIZE": "8"} | RENDEZVOUS


@pytest.fixture
def environment(monkeypatch):
    """Set the environment that a launcher or an operator gives a process."""

    def set_to(variables):
        for name in {*LEFT, *RENDEZVOUS, *TORCHRUN, "NODE_RANK", *LAUNCHERS}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_to


@pytest.mark.parametrize(
    ("variables", "is_job", "place"),
    [
        ({}, True, (0, 1)),
        (LEFT, True, (0, 1)),
        (LEFT | {"MASTER_ADDR": "node0"}, True, (0, 1)),
        (LEFT | RENDEZVOUS, False, (0, 1)),
        (LEFT | RENDEZVOUS, True, (3, 8)),
        (LEFT | TORCHRUN, False, (3, 8)),
        (LEFT | TORCHRUN | RENDEZVOUS, True, (3, 8)),
    ],
)
def test_the_place_of_a_process(environment, variables, is_job, place):
    environment(variables)
    ranks.forget_stale_variables(is_job)
    assert (ranks.rank(), ranks.world_size()) == place
    # what accelerate and Megatron read by themselves agrees
    assert [int(os.environ.get(name, none)) for name, none in (("RANK", 0), ("WORLD_SIZE", 1))] == list(place)
    assert ("LOCAL_RANK" in os.environ) == (place != (0, 1))


@pytest.mark.parametrize("place", [("8", "8"), ("-1", "8"), ("one", "8"), ("0", "0")])
def test_invalid_ranks_are_refused(environment, place):
    environment(dict(zip(("RANK", "WORLD_SIZE"), place, strict=True)) | RENDEZVOUS)
    with pytest.raises(UsageError, match=f"RANK={place[0]} and WORLD_SIZE={place[1]}"):
        ranks.forget_stale_variables()
    assert ranks.rank() == 0, "the process that says so"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_tools_of_one_process_are_not_silenced(environment, capsys, monkeypatch, verb):
    environment(LEFT if verb in ("prune", "cache-teacher", "compare") else LEFT | RENDEZVOUS)
    monkeypatch.setattr(cli.os, "_exit", lambda status: None)
    monkeypatch.setattr(cli.time, "sleep", lambda seconds: pytest.fail("waits for a launcher"))
    cli.main(verb, ["--no-such-flag"])
    assert capsys.readouterr().err.startswith(f"{verb}: error: ")


@pytest.mark.parametrize("mark", LAUNCHERS)
def test_a_launcher_must_say_which_gpu_is_whose(environment, mark):
    environment(PLACED | {mark: "3"})
    with pytest.raises(UsageError, match=rf"LOCAL_RANK=\${LAUNCHERS[mark]}"):
        ranks.forget_stale_variables()
    environment(PLACED | {mark: "3", "LOCAL_RANK": "x"})
    with pytest.raises(UsageError, match="LOCAL_RANK=x"):
        ranks.forget_stale_variables()
    for fine in (
        {mark: "3", "LOCAL_RANK": "1"},
        {mark: "0", "WORLD_SIZE": "1", "RANK": "0"},
        {},
        {mark: "3"} | TORCHRUN,
    ):
        environment(PLACED | fine)
        ranks.forget_stale_variables()
        assert ranks.world_size() == int((PLACED | fine)["WORLD_SIZE"])
