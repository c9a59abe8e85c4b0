"""Rules for the tests themselves, read from their sources."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent
TREES = {path.relative_to(TESTS): ast.parse(path.read_text()) for path in TESTS.rglob("*.py")}
FUNCTIONS = [
    (path, node) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
]


def called(function: ast.AST) -> set[str]:
    """Return the names of the functions that a function calls, without the objects that they belong to."""
    functions = [node.func for node in ast.walk(function) if isinstance(node, ast.Call)]
    return {node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in functions}


def asserts(function: ast.AST) -> bool:
    """Return whether a function itself can fail a test."""
    if any(isinstance(node, ast.Assert) for node in ast.walk(function)):
        return True
    return any(name in ("raises", "warns", "fail") or name.startswith("assert_") for name in called(function))


def that_assert() -> set[str]:
    """Return the names of the functions that can fail a test, by themselves or through another."""
    names: set[str] = set()
    while True:
        found = {node.name for _, node in FUNCTIONS if asserts(node) or called(node) & names}
        if found == names:
            return names
        names = found


def is_test(function: ast.FunctionDef) -> bool:
    return function.name.startswith("test_")


def test_every_test_asserts_something():
    names = that_assert()
    silent = [f"{path}::{test.name}" for path, test in FUNCTIONS if is_test(test) and test.name not in names]
    assert silent == []
    assert len([test for _, test in FUNCTIONS if is_test(test)]) > 400


def test_tests_that_start_torchrun_are_marked():
    """Those in tests/parallel are marked by their folder."""
    starting = [(path, test) for path, test in FUNCTIONS if is_test(test) and "torchrun" in called(test)]
    outside = [(path, test) for path, test in starting if path.parts[0] != "parallel"]
    assert len(outside) > 2
    marks = {f"{path}::{test.name}": " ".join(map(ast.unparse, test.decorator_list)) for path, test in outside}
    assert [name for name, decorators in marks.items() if "mark.parallel" not in decorators] == []
    words = "distributed" + ".run"
    spelled = [str(path) for path in TREES if f'"torch.{words}"' in (TESTS / path).read_text()]
    assert spelled == ["helpers/launch.py"], "use tests.helpers.launch.torchrun"
