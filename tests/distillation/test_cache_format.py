"""Precision of a teacher's targets in the cache."""

import pytest
import torch

from megaprune.distillation.cache_format import BlockLayout, CacheKey, CachePlan, block_checksum
from megaprune.distillation.losses import VocabShard, distillation_loss, teacher_targets, top_k_log_odds

S = 24


def targets_of(logits, k=10):
    return teacher_targets(logits, k, VocabShard(0, logits.shape[-1], logits.shape[-1]))


def stored(targets, vocab_size, top_k=None):
    layout = BlockLayout(*targets.indices.shape, vocab_size)
    block = layout.encode(targets)
    assert len(block) == layout.num_bytes
    return layout.decode(torch.frombuffer(bytearray(block), dtype=torch.uint8).numpy(), top_k or layout.top_k)


def random_logits(vocab_size, seed=0):
    """Return rows from uniform to nearly certain, each around a level of its own."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1.5, S)[:, None]
    return torch.randn(S, vocab_size, generator=generator) * scale + 20 * torch.randn(S, 1, generator=generator)


@pytest.mark.parametrize("vocab_size", [11, 331, 65536, 65537, 151936, 262144, 262145, 1 << 20])
def test_any_vocabulary(vocab_size):
    targets = targets_of(random_logits(vocab_size))
    targets.indices[0, :2] = torch.tensor([vocab_size - 1, 0])
    found = stored(targets, vocab_size)
    assert torch.equal(found.indices, targets.indices)
    below, wanted = ((t.logits - t.logits[:, :1]) for t in (found, targets))
    torch.testing.assert_close(below, wanted, atol=2e-5, rtol=2**-11)
    # where ten tokens of a flat distribution are next to nothing, so is what their logits' level decides
    torch.testing.assert_close(found.logits[:, 0], targets.logits[:, 0], atol=5e-3, rtol=2**-15)
    torch.testing.assert_close(found.logsumexp, targets.logsumexp, atol=0, rtol=2**-16)
    torch.testing.assert_close(found.entropy, targets.entropy, atol=1e-7, rtol=2**-11)
    assert (found.logits.diff() <= 0).all()


@pytest.mark.parametrize("vocab_size, most", [(331, 45), (65536, 45), (128256, 46.25), (151936, 47.5), (262144, 47.5)])
def test_bytes_of_a_token(vocab_size, most):
    plan = CachePlan(CacheKey("m", "t", "d", 4096, 1000, vocab_size), 10, "fp32")
    assert plan.layout.num_bytes == most * 4096
    assert plan.num_bytes <= 48 * 4096 * 1000
    assert sum(map(plan.shard_bytes, range(plan.num_shards))) == plan.num_bytes


@pytest.mark.parametrize("tail", ["renormalized", "rest", "full"])
@pytest.mark.parametrize("seed", range(3))
def test_losses_are_those_of_the_targets_themselves(tail, seed):
    logits = random_logits(500, seed)
    targets = targets_of(logits)
    found = stored(targets, 500)
    shard = VocabShard(0, 500, 500)
    for student in (logits, logits + 0.3 * torch.randn(S, 500), random_logits(500, seed + 7) / 5):
        wanted = distillation_loss(student, targets, shard, tail)
        torch.testing.assert_close(distillation_loss(student, found, shard, tail), wanted, atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(found.entropy, targets.entropy, atol=1e-7, rtol=2**-11)


def test_mass_beyond_the_top_k_is_kept_where_it_is_tiny():
    """Two tokens have nearly one half each: rounding their logits alone would lose the rest."""
    logits = torch.full((S, 1000), -1e4)
    logits[:, :2] = torch.tensor([3.0, 2.999])
    logits[:, 2:] = 3.0 - 16 - torch.linspace(0, 1, S)[:, None]
    targets = targets_of(logits)
    rest = -(top_k_log_odds(stored(targets, 1000)) - top_k_log_odds(targets)).abs()
    assert rest.abs().max() < 0.02  # relative, of about 1e-4


def test_prefix_of_the_top_k():
    targets = targets_of(random_logits(331))
    found, whole = stored(targets, 331, top_k=4), stored(targets, 331)
    assert torch.equal(found.indices, targets.indices[:, :4])
    assert torch.equal(found.logits, whole.logits[:, :4])
    assert torch.equal(found.logsumexp, whole.logsumexp)


def test_extreme_logits():
    logits = torch.zeros(S, 40)
    logits[:, 0] = 1e5  # certain, and further off than fp16 reaches
    logits[0, 1:] = -torch.inf
    logits[1] = 0
    found = stored(targets_of(logits), 40)
    assert all(column.isfinite().all() for column in (found.logits, found.logsumexp, found.entropy))
    torch.testing.assert_close(found.logits[:, 0], logits[:, 0], atol=1e-3, rtol=1e-5)
    whole = stored(targets_of(logits[:, :10]), 10)  # the top k are all
    assert whole.logits.isfinite().all()


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_that_are_none(number):
    logits = random_logits(40)
    logits[3, 5] = number
    with pytest.raises(ValueError, match="not finite"):
        stored(targets_of(logits), 40)


def test_checksums_know_their_window():
    assert block_checksum(b"abc", 1) != block_checksum(b"abc", 2) != block_checksum(b"abd", 2)


def test_shards_follow_from_the_data_alone():
    few = CachePlan(CacheKey("m", "t", "d", 32, 45, 331), 10, "fp32")
    assert [len(few.windows_of(shard)) for shard in range(few.num_shards)] == [8] * 5 + [5]
    many = CachePlan(CacheKey("m", "t", "d", 4096, 10**6, 151936), 10, "fp32")
    assert 60e6 < many.shard_bytes(0) <= 64e6
    assert many.windows_of(many.num_shards - 1).stop == 10**6
