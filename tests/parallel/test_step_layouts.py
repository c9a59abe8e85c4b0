"""A step of search has the same loss and gradients at every parallel layout, and on every process."""

import pytest
import torch

from tests.parallel import cases
from tests.parallel.layouts import STEP_LAYOUTS


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """Step on one process."""
    out = tmp_path_factory.mktemp("step") / "step"
    cases.mask_gradient(source("qwen3_tied"), {}, out)
    return torch.load(f"{out}.0")


@pytest.mark.parametrize("layout", STEP_LAYOUTS)
def test_step_is_the_same_at_every_layout(results, alone, layout):
    processes = STEP_LAYOUTS[layout][0]
    out = results(processes).path(f"step-{layout}")
    found = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    assert alone["mask"].abs().min() > 1e-4
    torch.testing.assert_close(found[0]["mask"], alone["mask"], atol=1e-6, rtol=1e-4)
    assert found[0]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert found[0]["norm"] == pytest.approx(alone["norm"], rel=1e-5)
    assert found[0]["parts"] == {name: pytest.approx(mean, rel=1e-5) for name, mean in alone["parts"].items()}
    torch.testing.assert_close(found[0]["taylor"], alone["taylor"], atol=0, rtol=1e-4)
    for other in found[1:]:
        assert torch.equal(other["taylor"], found[0]["taylor"])
        assert torch.equal(other["mask"], found[0]["mask"])  # the scores must be identical on all ranks
        assert [other[name] for name in ("loss", "norm", "parts")] == [
            found[0][name] for name in ("loss", "norm", "parts")
        ]
