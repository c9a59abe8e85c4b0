import math

import pytest
import torch
import torch.nn.functional as F

from megaprune.distillation.losses import (
    TeacherTargets,
    VocabShard,
    cross_entropy,
    distillation_loss,
    full_kl,
    gather_logits,
    teacher_targets,
    vocab_logsumexp,
)
from megaprune.utils.errors import MegapruneError, UsageError

S, B, VOCAB, PADDED = 3, 2, 11, 16
SHARD = VocabShard(start=0, size=PADDED, valid=VOCAB)
TAILS = ["renormalized", "rest", "full"]


def random_logits(seed, dtype=torch.float32, scale=3.0):
    """Return [S, B, PADDED] logits whose padding columns are larger than all others."""
    logits = scale * torch.randn(S, B, PADDED, generator=torch.Generator().manual_seed(seed))
    logits[..., VOCAB:] = 100.0
    return logits.to(dtype)


def value_and_grad(function, logits):
    """Return `function(logits)` and its gradient, with a different weight for each token."""
    logits = logits.clone().requires_grad_()
    value = function(logits)
    weights = torch.linspace(0.5, 2.0, value.numel(), dtype=value.dtype).reshape(value.shape)
    (grad,) = torch.autograd.grad((value * weights).sum(), logits)
    return value.detach(), grad


def reference_distillation(student, teacher, k, tail):
    """Compute the loss by its definition, with the whole vocabulary and without care for precision."""
    top, indices = teacher.topk(k, dim=-1)
    if tail == "rest":
        p, q = (logits.softmax(-1).gather(-1, indices) for logits in (teacher, student))
        p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], dim=-1) for x in (p, q))
    else:
        p = top.softmax(-1)
        q = student.gather(-1, indices).softmax(-1) if tail == "renormalized" else None
        q = student.softmax(-1).gather(-1, indices) if q is None else q
    return (p * (p.log() - q.log())).sum(-1)


LABELS = torch.tensor([[0, 10], [3, 3], [7, 1]])
INDICES = torch.tensor([0, 4, 10]).expand(S, B, 3)
TEACHER = random_logits(100, torch.bfloat16).float()

# Each: what the module computes, and plain torch on the real vocabulary.
CASES = {
    "logsumexp": (lambda z: vocab_logsumexp(z, SHARD), lambda z: z.logsumexp(-1)),
    "gather": (lambda z: gather_logits(z, INDICES, SHARD), lambda z: z.gather(-1, INDICES)),
    "cross_entropy": (
        lambda z: cross_entropy(z, LABELS, SHARD),
        lambda z: F.cross_entropy(z.flatten(0, 1), LABELS.flatten(), reduction="none").view(S, B),
    ),
    "full_kl": (
        lambda z: full_kl(TEACHER.to(z.dtype), z, SHARD),
        lambda z: F.kl_div(z.log_softmax(-1), TEACHER[..., :VOCAB].to(z.dtype).softmax(-1), reduction="none").sum(-1),
    ),
} | {
    tail: (
        lambda z, tail=tail: distillation_loss(z, teacher_targets(TEACHER, 4, SHARD), SHARD, tail),
        lambda z, tail=tail: reference_distillation(z, TEACHER[..., :VOCAB], 4, tail),
    )
    for tail in TAILS
}


@pytest.mark.parametrize("name", CASES)
def test_equals_plain_torch(name):
    ours, plain = CASES[name]
    logits = random_logits(0)
    before = logits.clone()
    value, grad = value_and_grad(ours, logits)
    expected, expected_grad = value_and_grad(plain, logits[..., :VOCAB])
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(grad[..., :VOCAB], expected_grad, atol=2e-6, rtol=2e-6)
    assert grad[..., VOCAB:].eq(0).all()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    logits = random_logits(0, torch.float64).requires_grad_()
    assert CASES[name][0](logits).dtype == torch.float64
    assert torch.autograd.gradcheck(CASES[name][0], logits)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padding", [-torch.inf, torch.inf, torch.nan])
def test_padding_has_no_influence(name, padding):
    logits = random_logits(0)
    expected = value_and_grad(CASES[name][0], logits)
    logits[..., VOCAB:] = padding
    value, grad = value_and_grad(CASES[name][0], logits)
    assert torch.equal(value, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.parametrize("name", CASES)
def test_bf16_logits_are_computed_in_fp32(name):
    logits = random_logits(0, torch.bfloat16)
    value, grad = value_and_grad(CASES[name][0], logits)
    expected, expected_grad = value_and_grad(CASES[name][0], logits.float())
    assert value.dtype == torch.float32 and grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
    # Rounded once, at the end.
    torch.testing.assert_close(grad, expected_grad.bfloat16(), atol=1e-7, rtol=1e-2)


def test_extreme_logits_stay_finite():
    logits = random_logits(0, scale=3000.0)
    for name, (ours, _) in CASES.items():
        value, grad = value_and_grad(ours, logits)
        assert value.isfinite().all() and grad.isfinite().all(), name


def test_labels_outside_the_vocabulary_give_something_finite():
    labels = LABELS.clone()
    labels[0, 0], labels[1, 0] = -100, PADDED - 1
    value, grad = value_and_grad(lambda z: cross_entropy(z, labels, SHARD), random_logits(0))
    assert value.isfinite().all() and grad.isfinite().all() and grad[..., VOCAB:].eq(0).all()


def test_teacher_targets():
    targets = teacher_targets(TEACHER, 4, SHARD)
    real = TEACHER[..., :VOCAB]
    top, indices = real.topk(4, dim=-1)
    assert torch.equal(targets.indices, indices) and targets.indices.dtype == torch.int64
    assert torch.equal(targets.logits, top) and targets.logits.dtype == torch.float32
    torch.testing.assert_close(targets.logsumexp, real.logsumexp(-1))
    torch.testing.assert_close(targets.entropy, torch.distributions.Categorical(logits=real).entropy())


def test_teacher_entropy_at_both_ends():
    logits = torch.zeros(2, 1, PADDED)
    logits[1, 0, 3] = 200.0
    entropy = teacher_targets(logits, 2, SHARD).entropy.flatten()
    torch.testing.assert_close(entropy, torch.tensor([math.log(VOCAB), 0.0]))


def test_equal_logits_rank_by_lower_index():
    logits = torch.tensor([1.0, 2.0, -1.0, 2.0, -0.0, 0.0, 1.0, -3.0, 1.0, -1.0, 2.0, *[9.0] * 5])
    targets = teacher_targets(logits.bfloat16(), 11, SHARD)
    assert targets.indices.tolist() == [1, 3, 10, 0, 6, 8, 4, 5, 2, 9, 7]
    assert targets.logits.tolist() == [2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0, -1.0, -3.0]


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_equal_logits_at_the_edge_of_the_top_k_rank_by_lower_index(k):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randint(-3, 4, (40, PADDED), generator=generator).float()
    logits[::4] = random_logits(0).flatten(0, 1).repeat(2, 1)[:10]  # some rows without equals
    top, indices = logits[:, :VOCAB].sort(dim=-1, descending=True, stable=True)
    targets = teacher_targets(logits, k, SHARD)
    assert torch.equal(targets.indices, indices[:, :k]) and torch.equal(targets.logits, top[:, :k])


def test_a_teacher_that_rules_tokens_out():
    logits = torch.zeros(1, PADDED)
    logits[:, 4:] = -torch.inf
    targets = teacher_targets(logits, 2, SHARD)
    torch.testing.assert_close(targets.entropy, torch.tensor([math.log(4)]))
    torch.testing.assert_close(targets.logsumexp, torch.tensor([math.log(4)]))


def test_targets_in_blocks_are_the_same(monkeypatch):
    expected = teacher_targets(TEACHER, 4, SHARD)
    monkeypatch.setattr("megaprune.distillation.losses.LOGITS_AT_ONCE", 2 * PADDED)
    targets = teacher_targets(TEACHER, 4, SHARD)
    for name in ("indices", "logits", "logsumexp", "entropy"):
        assert torch.equal(getattr(targets, name), getattr(expected, name)), name


def test_more_teacher_logits_than_vocabulary_are_refused():
    with pytest.raises(UsageError, match="--distill-top-k"):
        teacher_targets(TEACHER, VOCAB + 1, SHARD)


@pytest.mark.parametrize("tail", TAILS)
def test_distillation_from_the_whole_vocabulary_is_the_full_kl(tail):
    student = random_logits(0)
    targets = teacher_targets(TEACHER, VOCAB, SHARD)
    value, grad = value_and_grad(lambda z: distillation_loss(z, targets, SHARD, tail), student)
    expected, expected_grad = value_and_grad(lambda z: full_kl(TEACHER, z, SHARD), student)
    torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_student_that_is_the_teacher_has_nothing_to_learn(tail):
    targets = teacher_targets(TEACHER, 4, SHARD)
    value, grad = value_and_grad(lambda z: distillation_loss(z, targets, SHARD, tail), TEACHER)
    if tail == "full":  # the teacher renormalized on its top k is not the student: -log of the top k's mass
        log_mass = targets.logits.logsumexp(-1) - targets.logsumexp
        torch.testing.assert_close(value, -log_mass, atol=1e-6, rtol=1e-5)
    else:
        assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6


@pytest.mark.parametrize("teacher_gap", [-40.0, -8.0, 8.0, 40.0])
@pytest.mark.parametrize("student_gap", [-40.0, -8.0, 8.0, 40.0])
def test_rest_bucket_is_accurate_for_any_mass(teacher_gap, student_gap):
    # By how much 3 tokens lead all others: their mass goes from e^-40 to 1 - e^-40.
    noise = torch.randn(2, PADDED, generator=torch.Generator().manual_seed(0))
    noise[:, :3] += torch.tensor([[teacher_gap], [student_gap]])
    teacher, student = noise
    exact_teacher, exact_student = noise.double()[:, :VOCAB]
    targets = TeacherTargets(torch.arange(3), teacher[:3], exact_teacher.logsumexp(-1).float(), torch.tensor(torch.nan))
    student = student.clone().requires_grad_()
    value = distillation_loss(student, targets, SHARD, "rest")
    (grad,) = torch.autograd.grad(value, student)

    # In fp64, and with no mass taken as 1 minus another's.
    log_p, log_q = (
        torch.cat([z[:3], z[3:].logsumexp(-1, keepdim=True)]).log_softmax(-1) for z in (exact_teacher, exact_student)
    )
    expected = (log_p.exp() * (log_p - log_q)).sum()
    excess = log_q.exp() - log_p.exp()
    expected_grad = torch.cat([excess[:3], exact_student[3:].softmax(-1) * excess[3], torch.zeros(5)])
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-6, rtol=1e-4)


def test_top_k_mass_beyond_one_is_taken_as_one():
    # A cache in 16 bits rounds the logits: their logsumexp may pass that of the vocabulary.
    targets = teacher_targets(TEACHER, 4, SHARD)
    rounded = TeacherTargets(targets.indices, targets.logits + 0.5, targets.logsumexp, targets.entropy)
    value, grad = value_and_grad(lambda z: distillation_loss(z, rounded, SHARD, "rest"), random_logits(0))
    assert value.isfinite().all() and (value > 0).all() and grad.isfinite().all()


def test_unknown_tail_is_refused():
    with pytest.raises(MegapruneError, match="unknown tail 'none'"):
        distillation_loss(TEACHER, teacher_targets(TEACHER, 4, SHARD), SHARD, "none")


def test_targets_are_mapped_split_and_stacked():
    targets = teacher_targets(TEACHER, 4, SHARD)
    doubled = targets.map(lambda column: 2 * column)
    assert torch.equal(doubled.indices, 2 * targets.indices) and torch.equal(doubled.entropy, 2 * targets.entropy)
    again = TeacherTargets.stack([targets.window(place) for place in range(TEACHER.shape[1])])
    for name in ("indices", "logits", "logsumexp", "entropy"):
        assert torch.equal(getattr(again, name), getattr(targets, name)), name
