"""The loss of MTP layers: its value and gradient are those of transformers' modules."""

from dataclasses import replace

import pytest
import torch

from megaprune.distillation.losses import VocabShard, cross_entropy
from megaprune.distillation.multi_token import WithMTP
from megaprune.distillation.objectives import make_objective
from megaprune.distillation.teachers import vocab_shard
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.schedule import LossTokens, forward
from megaprune.pruning.step import train_step
from megaprune.weights.source import HFSource
from tests.helpers import mtp, tiny

KEPT = [0, 2, 4]
FACTOR = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return mtp.make_model(tmp_path_factory.mktemp("mtp"))


def step(source, kept, recompute=None):
    arch, engine = source.family.architecture(source.config), EngineOptions(ParallelSizes(), False, False, recompute)
    model = build_model(replace(arch, num_mtp=1).pruned(kept), [len(kept)], engine)
    import_weights(model, source, kept)
    trainer = Trainer(model, engine, OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=0.0))
    objective = WithMTP(make_objective("ce", "rest", vocab_shard(arch), None), vocab_shard(arch), 1, FACTOR)
    result = train_step(trainer, tiny.uneven_batches([2, 2]), objective, 0)
    norm = torch.stack([p.main_grad.norm() for p in model.parameters()]).norm().item()
    return trainer, result, norm


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kept, recompute", [(KEPT, None), ([0, 1], "full")])
def test_value_and_gradient_are_those_of_transformers(folder, kept, recompute):
    reference = mtp.Reference(folder, kept)
    own, ahead = reference.losses(tiny.uneven_batches([4]))
    (own + FACTOR * ahead).backward()
    trainer, result, norm = step(HFSource(folder), kept, recompute)
    wanted = {"lm_loss": own.item(), "mtp_1_loss": ahead.item()}
    assert result.parts == {name: pytest.approx(mean, rel=1e-5) for name, mean in wanted.items()}
    assert result.loss == pytest.approx((own + FACTOR * ahead).item(), rel=1e-5)
    assert norm == pytest.approx(reference.grad_norm(), rel=1e-4)
    # other passes run the model alone
    batches = tiny.uneven_batches([4])
    (logits,) = forward(trainer.ddp, batches, lambda logits, _: logits)
    assert len(logits) == batches[0].tokens.shape[1]


def test_layers_predict_ever_later_tokens():
    shard, generator = VocabShard(0, 11, 11), torch.Generator().manual_seed(0)
    batch = tiny.make_batch(torch.randint(11, (2, 7), generator=generator))
    batch.loss_mask[0, 3] = 0
    tokens, logits = LossTokens(batch, 0), torch.randn(18, 2, 11, generator=generator)
    objective = WithMTP(make_objective("ce", "rest", shard, None), shard, 2, 0.3)
    assert objective.shares == {"lm_loss": 1.0, "mtp_1_loss": 0.15, "mtp_2_loss": 0.15}
    weights, losses = objective.token_weights(tokens, None), objective.token_losses(logits, tokens, None)
    assert weights.shape == losses.shape == (3, 6, 2)
    for ahead in range(3):
        mask, labels = tokens.loss_mask[ahead:], tokens.labels[ahead:]
        assert torch.equal(weights[ahead, : 6 - ahead], mask) and not weights[ahead, 6 - ahead :].any()
        part = logits[6 * ahead : 6 * (ahead + 1) - ahead]
        torch.testing.assert_close(losses[ahead, : 6 - ahead], cross_entropy(part, labels, shard))
