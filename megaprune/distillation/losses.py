"""Token losses for recovery and search, over a vocabulary that tensor parallelism may have split.

Every function takes logits of shape [s, b, V/tp] (any leading dimensions will do; fp32, bf16 or fp16,
computed in fp32; fp64 stays fp64): this rank's contiguous columns of a padded vocabulary. Losses have the
leading shape, [s, b], in nats, and are the same on every tensor-parallel rank. Gradients follow Megatron's
convention: every rank of the group computes the same loss from the shared values, so that a sum over the
group in the forward pass is the identity in the backward pass. Padding columns have no influence and get
no gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megaprune.utils.errors import MegapruneError, UsageError

Tail = Literal["renormalized", "rest", "full"]
LossKind = Literal["adaptive", "kl", "ce"]

# Ranking takes up to 20 bytes a logit. Done in blocks of rows of this many logits, it takes at most some 300 MB.
LOGITS_AT_ONCE = 2**24
# The student's mass on the rest of the vocabulary is at least e^-80 of the top k's: it is 0 if k is the vocabulary.
_MIN_REST = -80.0


@dataclass(frozen=True)
class VocabShard:
    """The columns of the vocabulary that this rank's logits hold."""

    start: int
    """Global index of the first local column."""
    size: int
    """Local columns, padding included; the same on every rank."""
    valid: int
    """Local columns that are real tokens; they come first. 0 where a rank holds nothing but padding."""
    group: dist.ProcessGroup | None = None
    """The tensor-parallel group whose shards make up the vocabulary; None if this shard is all of it."""

    def locate(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return the local columns of global `indices`, and whether each is on this rank (if not, the column is
        arbitrary)."""
        local = indices - self.start
        return local.clamp(0, self.size - 1), (local >= 0) & (local < self.valid)

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce `values` over the shards, in place."""
        if self.group is not None:
            dist.all_reduce(values, op=op, group=self.group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the shards' `values`, [..., n] each: [..., n * tp]."""
        if self.group is None:
            return values
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class TeacherTargets:
    """The part of a teacher's output that a loss needs, for every token."""

    indices: Tensor
    """[..., k] int64, global vocabulary indices, by falling logit."""
    logits: Tensor
    """[..., k] fp32."""
    logsumexp: Tensor
    """[...], over the whole vocabulary."""
    entropy: Tensor
    """[...], nats, of the teacher's full distribution."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "TeacherTargets":
        """Apply a function to every tensor."""
        return TeacherTargets(*map(function, self._tensors()))

    def window(self, place: int) -> "TeacherTargets":
        """Return the targets [s, ...] of one window of a micro-batch's [s, b, ...]."""
        return self.map(lambda column: column[:, place])

    @classmethod
    def stack(cls, windows: Sequence["TeacherTargets"]) -> "TeacherTargets":
        """Join the targets [s, ...] of windows to those of a micro-batch, [s, b, ...]."""
        columns = zip(*(targets._tensors() for targets in windows), strict=True)
        return cls(*(torch.stack(column, dim=1) for column in columns))

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.indices, self.logits, self.logsumexp, self.entropy


def vocab_logsumexp(logits: Tensor, shard: VocabShard) -> Tensor:
    """Return the logsumexp [...] over the whole vocabulary of [..., V/tp]. Differentiable."""
    none = torch.empty(*logits.shape[:-1], 0, dtype=torch.long, device=logits.device)
    return _PickedAndOthers.apply(logits, none, shard)[1]


def gather_logits(logits: Tensor, indices: Tensor, shard: VocabShard) -> Tensor:
    """Return the logits at global vocabulary `indices` [..., k]: [..., k], fp32. Differentiable.

    An index outside the real vocabulary (-100, padding) gives 0; the caller masks its loss.
    """
    local, here = shard.locate(indices)
    picked = logits.gather(-1, local).to(_compute_dtype(logits))
    return _SumOverShards.apply(picked.masked_fill(~here, 0.0), shard)


def cross_entropy(logits: Tensor, labels: Tensor, shard: VocabShard) -> Tensor:
    """Return the cross-entropy [...] against `labels` [...], global indices.

    A label outside the real vocabulary gives a finite number without meaning; the loss mask must exclude it.
    """
    picked, others = _PickedAndOthers.apply(logits, labels.unsqueeze(-1), shard)
    # -log(e^picked / (e^picked + e^others)), exact for likely labels too.
    return -F.logsigmoid(picked.squeeze(-1) - others)


@torch.no_grad()
def teacher_targets(logits: Tensor, k: int, shard: VocabShard) -> TeacherTargets:
    """Return the teacher's top k, logsumexp and entropy (E3-Pruner keeps k = 10).

    The indices and their order are the same at every layout: of equal logits, common in bf16, the lower index comes
    first.

    Raises:
        UsageError: `k` is more than the vocabulary, which a rank can see if it holds all of it.
    """
    if shard.group is None and k > shard.valid:
        raise UsageError(f"--distill-top-k: {k} is more than the vocabulary's {shard.valid} tokens; lower it")
    indices, top_logits = _top_k(logits, k, shard)
    peak = top_logits[..., 0]
    rows, peaks = _row_blocks(logits, shard), peak.reshape(-1, 1).split(_rows_at_once(shard))
    sums = torch.cat([_exp_sums(block, top) for block, top in zip(rows, peaks, strict=True)], dim=-1)
    total, moment = shard.reduce(sums).reshape(2, *peak.shape)
    # H = -sum p log p with p = exp(below) / total: accurate where p is nearly 1, too.
    entropy = total.log() - moment / total
    return TeacherTargets(indices, top_logits, peak + total.log(), entropy)


def top_k_log_odds(targets: TeacherTargets) -> Tensor:
    """Return the log-odds [...] of the top k against all other tokens; finite."""
    log_mass = _log_mass(targets)
    return log_mass - _log1mexp(log_mass)


def distillation_loss(student_logits: Tensor, targets: TeacherTargets, shard: VocabShard, tail: Tail) -> Tensor:
    """Return KL(teacher || student) of every token, [...], from the teacher's top k (E3-Pruner, adaptive KD).

    `tail` says how the tokens beyond the top k count:
    - "renormalized": nothing; teacher and student are both softmaxed over the k (the paper's form).
    - "rest": one more outcome, whose probability is all the rest, on both sides.
    - "full": the student's probabilities are those of its full softmax; the teacher's sum to 1 over the k.
    """
    if tail == "renormalized":
        student = gather_logits(student_logits, targets.indices, shard).log_softmax(-1)
        return _kl(targets.logits.log_softmax(-1), student)

    # The student's distribution over its picked logits and, as one logit, all others: its softmax is exact
    # however near 0 or 1 the mass of the top k is, and so is its gradient.
    picked, others = _PickedAndOthers.apply(student_logits, targets.indices, shard)
    others = torch.maximum(others, picked.logsumexp(-1) + _MIN_REST)
    student = torch.cat([picked, others.unsqueeze(-1)], dim=-1).log_softmax(-1)
    if tail == "full":
        return _kl(targets.logits.log_softmax(-1), student[..., :-1])
    if tail == "rest":
        return _kl(_teacher_with_rest(targets), student)
    raise MegapruneError(f"unknown tail {tail!r} of the distillation loss: give renormalized, rest or full")


def full_kl(reference_logits: Tensor, logits: Tensor, shard: VocabShard) -> Tensor:
    """Return KL(reference || model) of every token over the whole vocabulary, [...].

    Differentiable in `logits`, not in `reference_logits`. Rounding may leave a zero KL at about -1e-6.
    """
    reference = reference_logits.detach()[..., : shard.valid]
    # Once to fp32, so that the two parts of the gradient, which nearly cancel, meet before they are rounded.
    logits = logits.to(_compute_dtype(logits))
    reference_logsumexp = vocab_logsumexp(reference_logits.detach(), shard)
    probabilities = (reference - reference_logsumexp.unsqueeze(-1)).exp_()
    expected = (probabilities * (reference - logits[..., : shard.valid])).sum(-1)
    return _SumOverShards.apply(expected, shard) - (reference_logsumexp - vocab_logsumexp(logits, shard))


class _PickedAndOthers(torch.autograd.Function):
    """The logits at distinct `indices` [..., k], and the logsumexp [...] of all others.

    The losses need nothing else of the vocabulary. The backward pass recomputes the softmax
    from the logits as they came, in one fp32 buffer, and rounds the finished gradient to their dtype once.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, indices: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
        dtype = _compute_dtype(logits)
        local, here = shard.locate(indices)
        picked = logits.gather(-1, local).to(dtype).masked_fill_(~here, 0.0)
        others = _exclude(logits.to(dtype, copy=True), local, here, shard)
        # Finite even where no column is left, so that inf - inf never occurs below.
        peak = others.amax(-1).clamp_min_(torch.finfo(dtype).min)
        peak = shard.reduce(peak, dist.ReduceOp.MAX)
        total = shard.reduce(others.sub_(peak.unsqueeze(-1)).exp_().sum(-1))
        logsumexp = peak + total.clamp_min_(torch.finfo(dtype).tiny).log_()
        ctx.save_for_backward(logits, indices, logsumexp)
        ctx.shard = shard
        return shard.reduce(picked), logsumexp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_picked: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor, None, None]:
        logits, indices, logsumexp = ctx.saved_tensors
        local, here = ctx.shard.locate(indices)
        grad = _exclude(logits - logsumexp.unsqueeze(-1), local, here, ctx.shard).exp_()
        grad.mul_(grad_logsumexp.unsqueeze(-1))
        grad.scatter_add_(-1, local, grad_picked.masked_fill(~here, 0.0))
        return grad.to(logits.dtype), None, None


class _SumOverShards(torch.autograd.Function):
    """Sum over the tensor-parallel group; the identity in the backward pass."""

    @staticmethod
    def forward(ctx, values: Tensor, shard: VocabShard) -> Tensor:
        return shard.reduce(values.clone())

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _exclude(values: Tensor, local: Tensor, here: Tensor, shard: VocabShard) -> Tensor:
    """Put -inf, in place, into padding columns and the columns `local` that are `here`."""
    values[..., shard.valid :] = -torch.inf
    # Added and not set: an index of another shard is clamped to a column that must not change.
    excluded = torch.zeros_like(local, dtype=values.dtype).masked_fill_(here, -torch.inf)
    return values.scatter_add_(-1, local, excluded)


def _kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Sum of p (log p - log q) over the last dimension, from log-probabilities."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def _teacher_with_rest(targets: TeacherTargets) -> Tensor:
    """Log-probabilities [..., k + 1]: of the top k, and of all the rest together."""
    rest = targets.logsumexp + _log1mexp(_log_mass(targets))
    return torch.cat([targets.logits, rest.unsqueeze(-1)], dim=-1).log_softmax(-1)


def _log_mass(targets: TeacherTargets) -> Tensor:
    """The log-probability [...], below 0, of the top k together."""
    # Rounding may put their mass at 1 and beyond: the rest is below eps.
    eps = torch.finfo(targets.logits.dtype).eps
    return (targets.logits.logsumexp(-1) - targets.logsumexp).clamp_max(-eps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, accurate at both ends (Maechler 2012)."""
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _rows_at_once(shard: VocabShard) -> int:
    return max(1, LOGITS_AT_ONCE // shard.size)


def _row_blocks(logits: Tensor, shard: VocabShard) -> list[Tensor]:
    """The real columns of [..., size] logits as blocks [rows, valid]."""
    return [block[:, : shard.valid] for block in logits.reshape(-1, shard.size).split(_rows_at_once(shard))]


def _exp_sums(logits: Tensor, peak: Tensor) -> Tensor:
    """Return the sums [2, n] of e^d and of d e^d, d = logit - peak, of [n, valid] logits and peaks [n, 1]."""
    # Finite, so that a logit of -inf adds 0 to both sums, and not 0 * -inf.
    below = (logits - peak).clamp_min_(-1e9)
    exp = below.exp()
    return torch.stack([exp.sum(-1), below.mul_(exp).sum(-1)])


def _top_k(logits: Tensor, k: int, shard: VocabShard) -> tuple[Tensor, Tensor]:
    """Global indices [..., k] int64 and fp32 logits [..., k] of the k largest; of equals the lower index."""
    local = torch.cat([_local_top_keys(block, k, shard.start) for block in _row_blocks(logits, shard)])
    keys = _top_keys(shard.gather(local), k).reshape(*logits.shape[:-1], k)
    bits = (keys >> 32).int()
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return 0xFFFFFFFF - (keys & 0xFFFFFFFF), bits.view(torch.float32)


def _local_top_keys(logits: Tensor, k: int, start: int) -> Tensor:
    """Return the ranking keys [n, k] of the k largest of [n, valid] logits, descending; padded as by `_top_keys`.

    Args:
        start: the global index of the first column.
    """
    valid = logits.shape[-1]
    # Ranking logits is cheaper than ranking keys, and is ambiguous only where the last of the k has equals.
    values, columns = logits.topk(min(k + 1, valid), dim=-1)
    keys = _top_keys(_ranking_keys(values, columns + start), k)
    if valid > k:
        # rows as numbers: each use of a mask as an index would make the host wait for the device
        open_rows = (values[:, k - 1] == values[:, k]).nonzero().squeeze(-1)
        every = torch.arange(start, start + valid, device=logits.device)
        keys[open_rows] = _top_keys(_ranking_keys(logits[open_rows], every), k)
    return keys


def _ranking_keys(logits: Tensor, indices: Tensor) -> Tensor:
    """Return int64 keys [n, m] that order logits [n, m] with global indices [n, m] or [m]: by logit, then by
    descending index. No two keys of a row are equal.

    The upper half is the bits of the fp32 logit, flipped for negative numbers, so that integers order as floats do.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # -0 becomes 0, its equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ordered.long().bitwise_left_shift_(32).add_(0xFFFFFFFF - indices)


def _top_keys(keys: Tensor, k: int) -> Tensor:
    """Return the k largest of [n, m] keys, descending; padded to k with the lowest key if m < k."""
    top = keys.topk(min(k, keys.shape[-1]), dim=-1).values
    return F.pad(top, (0, k - top.shape[-1]), value=torch.iinfo(torch.int64).min)
