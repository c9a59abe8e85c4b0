"""The learning rate of each iteration."""

import math

import pytest

from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource

pytestmark = pytest.mark.usefixtures("one_process")
PEAK = 1e-2


@pytest.fixture(scope="module")
def rates(tiny_model):
    """Return a function that gives the learning rates of iterations, by default of all of them in order."""
    source = HFSource(tiny_model("llama2"))
    arch = source.family.architecture(source.config)

    def get(style="cosine", warmup=0, min_lr=0.0, train_iters=8, iterations=None):
        model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))
        import_weights(model, source)
        options = OptimizerOptions(PEAK, min_lr, style, warmup, train_iters, weight_decay=0.0, clip_grad=1.0)
        trainer = Trainer(model, EngineOptions(ParallelSizes()), options)
        found = []
        for iteration in range(train_iters) if iterations is None else iterations:
            trainer.zero_grad()
            found.append(trainer.step(iteration)[0])
            assert all(group["lr"] == found[-1] for group in trainer.optimizer.param_groups)
        return found

    return get


def cosine(share, lowest=0.0):
    return lowest + (PEAK - lowest) * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.parametrize(
    ("style", "decay"),
    [
        ("cosine", [cosine(i / 8) for i in range(8)]),
        ("linear", [PEAK * (1 - i / 8) for i in range(8)]),
        ("inverse-square-root", [PEAK / max(1, i) ** 0.5 for i in range(8)]),
        ("constant", [PEAK] * 8),
    ],
)
def test_each_iteration_has_the_value_at_its_beginning(rates, style, decay):
    """Match Megatron-LM. The last iteration has an effect although the schedule ends at 0."""
    assert rates(style) == pytest.approx(decay)
    assert min(rates(style)) > 0


def test_warm_up_begins_above_0_and_ends_at_the_peak(rates):
    assert rates(warmup=3) == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK, *(cosine(i / 5) for i in range(5))])


@pytest.mark.parametrize("warmup", [4, 9])
def test_run_may_end_within_its_warm_up(rates, warmup):
    assert rates(warmup=warmup, train_iters=4) == pytest.approx([PEAK * (i + 1) / warmup for i in range(4)])


def test_lowest_rate_is_that_of_the_end(rates):
    found = rates(min_lr=1e-3)
    assert found == pytest.approx([cosine(i / 8, 1e-3) for i in range(8)])
    assert found[-1] > 1e-3


def test_resumed_run_goes_on_in_the_schedule(rates):
    assert rates(warmup=3, iterations=[2, 3, 7]) == [rates(warmup=3)[i] for i in (2, 3, 7)]
