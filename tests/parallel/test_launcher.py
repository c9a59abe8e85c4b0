"""Cases that share a launch fail separately: each test sees the traceback of its own case."""

import pytest

from tests.helpers.launch import launch, launch_cases

FAILURES = {
    "together": ("fail_together", "all of us"),
    "unknown": ("no_such_function", "no_such_function"),
    "last": ("fail_after_the_others", "nobody waits"),
    "alone": ("fail_alone", "only me"),
    "died": ("die", "the last words of rank 1"),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Cases that pass before, between and after failing cases."""
    folder = tmp_path_factory.mktemp("launched")
    cases = {"before": dict(kind="launcher_cases.add", out=folder / "before")}
    for name, (function, why) in FAILURES.items():
        arguments = dict(why=why) if function.startswith("fail") else {}
        cases[name] = dict(kind=f"launcher_cases.{function}", **arguments)
        cases[f"after-{name}"] = dict(kind="launcher_cases.add", out=folder / f"after-{name}")
    return launch_cases(2, cases, folder)


@pytest.mark.parametrize("name", ["before", *(f"after-{name}" for name in FAILURES)])
def test_other_cases_go_on(launched, name):
    assert launched.path(name).read_text() == "3"


@pytest.mark.parametrize("name", FAILURES)
def test_a_case_that_fails_shows_its_own_traceback(launched, name):
    function, said = FAILURES[name]
    with pytest.raises(pytest.fail.Exception) as failure:
        launched.path(name)
    text = str(failure.value)
    assert text.startswith(f"{name} failed on 2 processes:\n")
    assert said in text
    others = [words for other, (_, words) in FAILURES.items() if other != name]
    assert [words for words in others if words in text] == []
    if function.startswith("fail"):
        assert text.count("ValueError: ") == 1 and f", in {function}\n" in text


def test_ranks_that_fail_alike_show_one_traceback(launched):
    assert "\nrank 0, 1: Traceback" in launched.failures["together"].replace("rank 1, 0", "rank 0, 1")


def test_torchrun_is_started_again_only_where_ranks_were_lost(launched):
    lost = 2  # "alone" and "died"
    assert len(list(launched.folder.glob("attempt*"))) == 1 + lost


def test_one_test_for_all_cases_fails_with_every_failure(tmp_path):
    cases = [dict(kind="launcher_cases.fail_together", why=why) for why in ("the first", "the second")]
    with pytest.raises(pytest.fail.Exception, match=r"(?s)the first.*the second"):
        launch(1, cases, tmp_path)


def test_processes_that_cannot_start_fail_every_case(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("tests.helpers.launch.WORKER", tmp_path / "missing.py")
    launched = launch_cases(1, {name: dict(kind="launcher_cases.die") for name in ("a", "b")}, tmp_path)
    assert launched.failures.keys() == {"a", "b"}
    assert "missing.py" in launched.failures["b"]
