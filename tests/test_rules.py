"""Rules of the code that an import linter cannot see, read from the sources."""

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
        ("api.py", "pruning/resolve.py"),
    ),
}


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
