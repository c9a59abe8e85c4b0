"""Objectives: the weights and losses of each on a micro-batch, and its request to the teacher."""

import pytest
import torch

from megaprune.distillation.losses import VocabShard, cross_entropy, distillation_loss, teacher_targets
from megaprune.distillation.objectives import make_objective
from megaprune.mcore.schedule import LossTokens
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny

S, B, VOCAB = 5, 2, 11
SHARD = VocabShard(0, VOCAB, VOCAB)


class FixedTeacher:
    def __init__(self, targets):
        self.asked, self._targets = 0, targets

    def targets(self, batches):
        self.asked += 1
        return [self._targets] * len(batches)


@pytest.fixture
def batch():
    return tiny.make_batch(torch.randint(VOCAB, (B, S + 1), generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def logits():
    return torch.randn(2, S, B, VOCAB, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["ce", "kl", "adaptive"])
def test_weights_and_losses(kind, batch, logits):
    student, original = logits
    batch.loss_mask[0, 1] = 0
    tokens, wanted = LossTokens(batch, 0), teacher_targets(original, 4, SHARD)
    assert tokens.labels.shape == tokens.loss_mask.shape == (S, B) and tokens.loss_mask[1, 0] == 0
    teacher = FixedTeacher(wanted)
    objective = make_objective(kind, "rest", SHARD, None if kind == "ce" else teacher)
    targets = objective.targets([batch, batch])
    assert len(targets) == 2 and teacher.asked == (kind != "ce")
    weights = objective.token_weights(tokens, targets[0])
    assert torch.equal(weights, tokens.loss_mask * (wanted.entropy if kind == "adaptive" else 1))
    losses = objective.token_losses(student, tokens, targets[0])
    if kind == "ce":
        assert torch.equal(losses, cross_entropy(student, batch.labels.t(), SHARD))
    else:
        assert torch.equal(losses, distillation_loss(student, wanted, SHARD, "rest"))


@pytest.mark.parametrize("kind", ["kl", "adaptive"])
def test_a_mixture_has_both_parts_each_with_its_own_weights(kind, batch, logits):
    student, original = logits
    batch.loss_mask[1, 2] = 0
    tokens, wanted = LossTokens(batch, 0), teacher_targets(original, 4, SHARD)
    objective = make_objective(kind, "rest", SHARD, FixedTeacher(wanted), 0.25)
    (targets,) = objective.targets([batch])
    assert dict(objective.shares) == {"kd_loss": 0.25, "lm_loss": 0.75}
    weights = objective.token_weights(tokens, targets)
    assert torch.equal(weights[0], tokens.loss_mask * (wanted.entropy if kind == "adaptive" else 1))
    assert torch.equal(weights[1], tokens.loss_mask)
    losses = objective.token_losses(student, tokens, targets)
    assert torch.equal(losses[0], distillation_loss(student, wanted, SHARD, "rest"))
    assert torch.equal(losses[1], cross_entropy(student, batch.labels.t(), SHARD))


def test_all_distillation_is_no_mixture():
    assert list(make_objective("adaptive", "rest", SHARD, None, 1.0).shares) == ["kd_loss"]


@pytest.mark.parametrize("kind", ["kl", "adaptive"])
def test_a_distillation_loss_without_a_teacher_is_refused_at_the_first_step(kind, batch):
    with pytest.raises(MegapruneError, match="--distill-loss"):
        make_objective(kind, "rest", SHARD, None).targets([batch])
