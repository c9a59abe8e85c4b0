"""Rules of the code that an import linter cannot see, read from the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "megaprune").rglob("*.py"))
RULES = {
    # what is looked for, where it may stand, and exceptions: scripts that a benchmark hands to another process
    "command-line words": (r"\bsys\.argv\b", ("cli",), ("benchmarks/convert.py",)),
    "which device this is": (r"\btorch\.cuda\b|\bis_available\(", ("device",), ()),
    "how a model is made of chunks and layers": (r"\.decoder\.|\blayer_number\b|\.scheduled\b", ("mcore",), ()),
    "printing": (r"(?<![\w.\"'])print\(", ("cli",), ("utils/failure.py", "benchmarks/convert.py")),
    "ending the process": (
        r"\bsys\.exit\b|\bos\._exit\b|\bSystemExit\b",
        ("cli",),
        ("utils/failure.py", "data/preprocess.py", "benchmarks/convert.py"),
    ),
    "settings read from a Config": (
        r"\bconfig\.(model|data|prune|search|recovery|distillation|lora|parallel|engine|run)\.",
        ("cli", "config", "planning", "comparison"),
        ("api.py", "pruning/resolve.py", "pruning/resolve_budget.py", "pruning/resolve_training.py"),
    ),
}

# Names of other projects that the package defines for them: of transformers' HfArgumentParser.
FOREIGN_NAMES = {"_argument_group_name"}


@pytest.mark.parametrize("rule", RULES)
def test_stands_only_where_it_may(rule):
    pattern, rooms, files = RULES[rule]
    found = {path.relative_to(ROOT / "megaprune") for path in SOURCES if re.search(pattern, path.read_text())}
    assert found, "the pattern finds nothing: it is wrong, or the rule can go"
    assert [str(path) for path in found if path.parts[0] not in rooms and str(path) not in files] == []


def test_no_file_outgrows_a_sitting():
    tests = (ROOT / "tests").rglob("*.py")
    long = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in (*SOURCES, *tests)}
    assert {path: lines for path, lines in long.items() if lines > 400} == {}


def _names_of_the_package() -> set[str]:
    """Return the private names that the package defines."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if re.match(r"_(?!_)\w", name)} - FOREIGN_NAMES


def _used(node: ast.AST) -> list[str]:
    """Return the names that a node uses of other modules and objects, in code or as the text of a `setattr`."""
    if isinstance(node, ast.ImportFrom):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.Attribute):
        own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
        return [] if own else [node.attr]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
        "setattr",
        "getattr",
    ):
        texts = [word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)]
        return [text.rpartition(".")[2] for text in texts]
    return []


def test_tests_use_no_private_names_of_the_package():
    private = _names_of_the_package()
    assert len(private) > 500
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} {name}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _used(node)
        if name in private
    ]
    assert found == []
