"""The average of the weights over the last iterations: its value, its checkpoints, and its export."""

import pytest
import torch

from megaprune.mcore import checkpoint
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource

pytestmark = pytest.mark.usefixtures("one_process")
FIRST, LAST = 2, 5


@pytest.fixture(params=["plain", "distributed", "bf16", "bf16_distributed"])
def make_trainer(request, tiny_model):
    source = HFSource(tiny_model("qwen3_tied"))
    arch = source.family.architecture(source.config)
    engine = EngineOptions(ParallelSizes(), bf16="bf16" in request.param)
    distributed = "distributed" in request.param

    def make(averaged_from=FIRST):
        model = build_model(arch, [arch.num_layers], engine)
        import_weights(model, source)
        options = OptimizerOptions(
            1e-2, 1e-2, "constant", 0, 10, 0.0, 0.0, distributed=distributed, averaged_from=averaged_from
        )
        return Trainer(model, engine, options)

    return make


def step(trainer, iteration):
    trainer.zero_grad()
    generator = torch.Generator().manual_seed(iteration)
    for parameter in trainer.model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    trainer.step(iteration)


def weights(trainer):
    """Return a copy of every parameter, in fp32 where the optimizer holds it whole."""
    found = []
    for parameter in trainer.model.parameters():
        main = getattr(parameter, "main_param", None)
        whole = parameter if main is None or main.shape != parameter.shape else main
        found.append(whole.detach().float().clone())
    return found


def test_the_model_becomes_the_mean_of_its_last_weights(make_trainer):
    trainer, seen = make_trainer(), []
    for iteration in range(LAST):
        step(trainer, iteration)
        seen.append(weights(trainer))
    trainer.average.use()
    for parameter, *history in zip(trainer.model.parameters(), *seen, strict=True):
        mean = torch.stack(history[FIRST:]).mean(0)
        assert not torch.allclose(history[-1], mean, atol=1e-3)
        # within rounding, which in bf16 is that of the stored weight
        torch.testing.assert_close(parameter.detach().float(), mean.to(parameter.dtype).float(), rtol=8e-3, atol=1e-6)


@pytest.mark.parametrize("saved_after", [FIRST, FIRST + 2], ids=["before", "within"])
def test_a_resumed_average_has_the_same_bits(make_trainer, tmp_path, saved_after):
    trainer = make_trainer()
    for iteration in range(saved_after):
        step(trainer, iteration)
    folder = checkpoint.save(tmp_path, saved_after, trainer, {})
    resumed = make_trainer()
    checkpoint.load(folder, resumed)
    for iteration in range(saved_after, LAST):
        step(trainer, iteration)
        step(resumed, iteration)
    for each in (trainer, resumed):
        each.average.use()
    for parameter, expected in zip(resumed.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_nothing_changes_before_the_first_iteration_that_counts(make_trainer):
    trainer, other = make_trainer(averaged_from=LAST), make_trainer(averaged_from=None)
    for iteration in range(2):
        step(trainer, iteration)
        step(other, iteration)
    trainer.average.use()
    assert other.average is None
    for parameter, expected in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(parameter, expected)
