"""Passes that measure and change nothing: validation loss, and the loss of the model without some of its layers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaprune import device
from megaprune.distillation.losses import VocabShard, cross_entropy, full_kl
from megaprune.mcore import parallel, schedule
from megaprune.mcore.layers.gated import LayerGate, frozen
from megaprune.mcore.layers.linear_patch import hadamard
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.selection.evaluator import LossKind
from megaprune.selection.masks import shared_order
from megaprune.utils.errors import MegapruneError


def mean_loss(model: PipelineModel, batches: Sequence[schedule.MicroBatch], shard: VocabShard) -> float:
    """Mean next-token cross-entropy in nats over the tokens that the batches' loss masks count. Collective.

    Args:
        batches: this replica's share of the data.

    Raises:
        MegapruneError: the loss is not finite.
    """

    def collect(logits: Tensor, tokens: schedule.LossTokens) -> Tensor:
        loss = (cross_entropy(logits, tokens.labels, shard) * tokens.loss_mask).double()
        return torch.stack([loss.sum(), tokens.loss_mask.double().sum()])

    total, count = _total(schedule.forward(model, batches, collect), (2,)).tolist()
    loss = total / count
    if not loss < float("inf"):
        raise MegapruneError(f"the validation loss is {loss}: the model or --valid-data is damaged")
    return loss


def mask_losses(
    model: PipelineModel,
    gate: LayerGate,
    batches: Sequence[schedule.MicroBatch],
    masks: Tensor,
    shard: VocabShard,
    loss: LossKind,
) -> Tensor:
    """The loss of the model under each mask, in nats per token, [number of masks] on the CPU, the same bits on every
    rank. Collective.

    Each micro-batch runs under all masks, one after the other through the pipeline, so that for KL one micro-batch's
    original logits are all that is kept. Masks that begin alike come one after the other, and what the layers up to
    the first difference gave is taken over.

    Args:
        masks: [number of masks, num_layers]; 1 keeps a layer.
        loss: KL(original || masked model), or cross-entropy with the data.
    """
    order = shared_order(masks)
    rows: list[Tensor | None] = [*([None] if loss == "kl" else []), *masks[order]]
    runs = [batch for batch in batches for _ in rows]
    reference: list[Tensor] = []

    def before(tokens: schedule.LossTokens) -> None:
        if tokens.number % len(rows) == 0:
            gate.forget()
        gate.set(rows[tokens.number % len(rows)], device.torch_device())

    def collect(logits: Tensor, tokens: schedule.LossTokens) -> Tensor:
        if rows[tokens.number % len(rows)] is None:
            reference[:] = [logits]
            return torch.zeros(2, dtype=torch.float64, device=logits.device)
        if loss == "kl":
            losses = full_kl(reference[0], logits, shard)
        else:
            losses = cross_entropy(logits, tokens.labels, shard)
        return torch.stack([(losses * tokens.loss_mask).sum(), tokens.loss_mask.sum()]).double()

    with gate.sharing_prefixes():
        collected = schedule.forward(model, runs, collect, before)
    gate.set(None)
    of_rows = [torch.stack(collected[row :: len(rows)]).sum(0) for row in range(len(rows))] if collected else []
    sums = _total([torch.stack(of_rows)] if of_rows else [], (len(rows), 2))[len(rows) - len(masks) :]
    found = torch.empty(len(masks), dtype=torch.float64)
    found[order] = sums[:, 0] / sums[:, 1]
    return parallel.broadcast_from_rank0(found).float()


def mask_gradient(
    model: PipelineModel,
    gate: LayerGate,
    batches: Sequence[schedule.MicroBatch],
    mask: Tensor,
    shard: VocabShard,
) -> tuple[float, Tensor]:
    """KL(original || masked model) in nats per token, and its gradient in the mask [num_layers], on the CPU; the
    weights get none. The same bits on every rank. Collective.

    Args:
        mask: [num_layers], soft or hard.
    """
    with frozen(model):
        with gate.all_layers():
            references = schedule.forward(model, batches, lambda logits, _: logits.detach().clone())
        gate.set(mask, device.torch_device())
        mean = schedule.mean_token_loss(
            model,
            batches,
            lambda tokens: tokens.loss_mask,
            lambda logits, tokens: full_kl(references[tokens.number], logits, shard),
        )
    grad = parallel.reduce_mask_gradient(gate.take_gradient(), model.config.sequence_parallel)
    gate.set(None)
    return mean, grad


def block_influence(model: PipelineModel, batches: Sequence[schedule.MicroBatch], num_layers: int) -> Tensor:
    """ShortGPT's block influence (Men et al., 2024): the mean over tokens of 1 - cos(layer's input, its output), in
    fp32, [num_layers] on the CPU, the same bits on every rank. Collective.

    Tokens that carry no loss don't count.
    """
    # of each layer: the sum, and how many tokens are in it (as often as tensor-parallel ranks that hold them)
    sums = torch.zeros(2, num_layers, dtype=torch.float64, device=device.torch_device())
    weights = [torch.ones(())]

    def before(tokens: schedule.LossTokens) -> None:
        weights[0] = _own_share(tokens.loss_mask, model)

    def measure(layer: int, entering: Tensor, leaving: Tensor) -> None:
        similarity = torch.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        sums[0, layer] += ((1 - similarity) * weights[0]).sum()
        sums[1, layer] += weights[0].sum()

    with model.watched_layers(measure):
        schedule.forward(model, batches, lambda logits, tokens: None, before)
    total, count = parallel.sum_over_all(sums)
    return (total / count).float()


def jump_across(
    model: PipelineModel, batches: Sequence[schedule.MicroBatch], first: int, last: int, hidden_size: int
) -> Tensor:
    """By what the layers `first` to `last` change the hidden states' mean magnitude: LinearPatch's d, [hidden_size]
    fp32 on the CPU, channel by channel in the Hadamard basis; the same bits on every rank. Collective.

    Tokens that carry no loss don't count.
    """
    # mean magnitudes before the first layer and behind the last, added up over tokens
    sums = torch.zeros(2, hidden_size, dtype=torch.float64, device=device.torch_device())
    weights = [torch.ones(())]

    def before(tokens: schedule.LossTokens) -> None:
        weights[0] = _own_share(tokens.loss_mask, model)

    def add(row: int, hidden: Tensor) -> None:
        sums[row] += (hadamard(hidden.float()).abs() * weights[0].unsqueeze(-1)).sum((0, 1))

    def measure(layer: int, before_it: Tensor, behind_it: Tensor) -> None:
        if layer == first:
            add(0, before_it)
        if layer == last:
            add(1, behind_it)

    with model.watched_layers(measure):
        schedule.forward(model, batches, lambda logits, tokens: None, before)
    entering, leaving = parallel.sum_over_all(sums)
    return (leaving / entering.clamp_min(torch.finfo(torch.float32).tiny)).float()


def _own_share(weights: Tensor, model: PipelineModel) -> Tensor:
    """The part of a micro-batch's weights [s, b] that belongs to the hidden states on this rank."""
    place = parallel.tensor_parallel()
    return weights.chunk(place.size)[place.rank] if model.config.sequence_parallel else weights


def _total(collected: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Sums what the last stage collected over micro-batches and replicas; the same on every rank, on the CPU."""
    total = torch.zeros(shape, dtype=torch.float64, device=device.torch_device())
    if collected:
        total = parallel.sum_over_data_parallel(torch.stack(list(collected)).sum(0))
    return parallel.broadcast_from_last_stage(total.cpu())
