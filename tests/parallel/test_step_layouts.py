"""A step of search has the same loss and gradients at every parallel layout, and on every process."""

import pytest
import torch

from megaprune.mcore import parallel
from megaprune.mcore.parallel import ParallelSizes
from tests.helpers import tiny
from tests.parallel import cases
from tests.parallel.layouts import OWN_MASKS_LAYOUTS, STEP_LAYOUTS


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The step on one process."""
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
    torch.testing.assert_close(found[0]["taylor"], alone["taylor"], atol=0, rtol=1e-4)
    for other in found[1:]:
        assert torch.equal(other["taylor"], found[0]["taylor"])
        assert torch.equal(other["mask"], found[0]["mask"])  # the scores must never drift apart
        assert (other["loss"], other["norm"]) == (found[0]["loss"], found[0]["norm"])


@pytest.fixture(scope="module")
def gradient_of_own_masks(source):
    """The mean over two replicas of the scores' gradient, each by its own mask, one after the other alone."""
    gradients = []
    for replica in range(2):
        parallel.initialize(ParallelSizes())
        batches = tiny.uneven_batches([1, 1, 1, 1])
        share = [sum(int(b.loss_mask.sum()) for b in some) for some in (batches[replica::2], batches)]
        search = tiny.own_search(replica, lambda gradient: gradients.append(gradient.clone()) or gradient)
        cases.step_of_own_mask(source("qwen3_tied"), ParallelSizes(), batches[replica::2], search)
        gradients[-1] *= share[0] / share[1]
        parallel.finish()
    return sum(gradients)


@pytest.mark.parametrize("layout", OWN_MASKS_LAYOUTS)
def test_replicas_with_masks_of_their_own_learn_the_same_scores(results, gradient_of_own_masks, layout):
    processes = OWN_MASKS_LAYOUTS[layout][0]
    out = results(processes).path(f"step-own-{layout}")
    found = [torch.load(f"{out}.{rank}") for rank in range(processes)]
    masks = {tuple(one["mask"].tolist()) for one in found}
    assert len(masks) == 2 and all(sum(mask) == 4 for mask in masks)
    for one in found:
        assert torch.equal(one["state"]["scores"], found[0]["state"]["scores"])
    momentum = 0.1 * gradient_of_own_masks
    assert momentum.abs().max() > 1e-5
    torch.testing.assert_close(found[0]["state"]["adam"]["exp_avg"], momentum, atol=1e-8, rtol=1e-3)
