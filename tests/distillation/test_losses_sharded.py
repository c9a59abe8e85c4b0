"""The losses over a vocabulary split between two processes equal those of one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megaprune.distillation.losses import (
    VocabShard,
    cross_entropy,
    distillation_loss,
    full_kl,
    gather_logits,
    teacher_targets,
    vocab_logsumexp,
)

S, B, TP, K = 4, 2, 2, 5
# (real, padded) vocabulary: padding on the last rank only; fewer than K real columns there; none at all.
VOCABULARIES = [(21, 24), (15, 24), (11, 24)]


def all_losses(student, teacher, labels, shard):
    """Return, by name: results that must be equal bit for bit, results equal up to rounding, and the student's
    gradients.
    """
    targets = teacher_targets(teacher, K, shard)
    losses = {
        "logsumexp": lambda z: vocab_logsumexp(z, shard),
        "gather": lambda z: gather_logits(z, targets.indices, shard).sum(-1),
        "cross_entropy": lambda z: cross_entropy(z, labels, shard),
        "full_kl": lambda z: full_kl(teacher, z, shard),
    } | {
        tail: lambda z, tail=tail: distillation_loss(z, targets, shard, tail)
        for tail in ("renormalized", "rest", "full")
    }
    exact = {"indices": targets.indices, "logits": targets.logits}
    close = {"teacher_logsumexp": targets.logsumexp, "entropy": targets.entropy}
    grads = {}
    for name, loss in losses.items():
        logits = student.clone().requires_grad_()
        close[name] = loss(logits)
        weights = torch.linspace(0.5, 2.0, S * B).view(S, B)
        (grads[name],) = torch.autograd.grad((close[name] * weights).sum(), logits)
    return exact, close, grads


def check(rank, padded, real, dtype):
    generator = torch.Generator().manual_seed(real)
    # In halves, so that ties abound, within a shard and across.
    student, teacher = (torch.randn(2, S, B, padded, generator=generator) * 4).round().div(2).to(dtype)
    labels = torch.randint(real, (S, B), generator=generator)
    labels[0, 0] = -100
    size = padded // TP
    start = rank * size
    shard = VocabShard(start, size, min(max(real - start, 0), size), dist.group.WORLD)
    mine = slice(start, start + size)

    exact, close, grads = all_losses(student[..., mine], teacher[..., mine], labels, shard)
    whole = all_losses(student, teacher, labels, VocabShard(0, padded, real))
    for name, value in exact.items():
        assert torch.equal(value, whole[0][name]), (name, real)
    for name, value in close.items():
        torch.testing.assert_close(value, whole[1][name], atol=1e-5, rtol=1e-5, msg=f"{name} {real}")
    # Gradients of bf16 logits are rounded to bf16.
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    for name, grad in grads.items():
        expected = whole[2][name][..., mine]
        torch.testing.assert_close(grad, expected, atol=1e-6, rtol=rtol, msg=f"gradient of {name} {real}")
        assert expected[..., shard.valid :].eq(0).all()


def worker(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=TP)
    for dtype in (torch.float32, torch.bfloat16):
        for real, padded in VOCABULARIES:
            check(rank, padded, real, dtype)
            Path(f"{rendezvous}-rank{rank}-{dtype}-{real}").touch()
    # gloo aborts a process whose peer leaves first
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_equals_whole(tmp_path):
    mp.spawn(worker, args=(tmp_path / "rendezvous",), nprocs=TP)
    assert len(list(tmp_path.glob("rendezvous-rank*"))) == TP * 2 * len(VOCABULARIES)
