"""Names and shapes of all parameters with the real Transformer Engine, on the meta device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny

pytestmark = [pytest.mark.te, pytest.mark.slow]
MODELS = 12


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results by model and layout; from a process of its own, because the package must see a GPU."""
    output = tmp_path_factory.mktemp("te") / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.te.names", str(output)],
        cwd=Path(__file__).parents[2],
        env=tiny.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(output.read_text())


def test_every_model_is_built_at_several_layouts(found):
    assert {name: result["error"] for name, result in found.items() if "error" in result} == {}
    assert len({name.partition(" ")[0] for name in found}) == MODELS
    assert len(found) == 6 * 3 + 6 * 6  # dense models and models with experts, each at its layouts


def test_every_parameter_has_a_rule_and_every_rule_a_parameter(found):
    for name, result in found.items():
        assert result["parameters"] > 20, name
        assert result["without a rule"] == result["rules without a parameter"] == [], name
        assert result["missing experts"] == 0, name


def test_shards_have_the_shapes_of_the_parameters(found):
    assert {name: result["wrong shapes"] for name, result in found.items() if result["wrong shapes"]} == {}
