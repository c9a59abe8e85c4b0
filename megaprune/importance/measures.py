"""Forward passes that measure a model without changing it: validation loss, and losses with some layers masked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from megaprune import device
from megaprune.distillation.losses import VocabShard, cross_entropy, full_kl
from megaprune.mcore import parallel, schedule
from megaprune.mcore.layers.gated import LayerGate, frozen
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

    return mean_of(loss_sums(model, batches, shard))


def loss_sums(model: PipelineModel, batches: Sequence[schedule.MicroBatch], shard: VocabShard) -> Tensor:
    """Return the sum of the losses of `mean_loss` and the number of their tokens, fp64 [2] on the CPU. Collective."""

    def collect(logits: Tensor, tokens: schedule.LossTokens) -> Tensor:
        loss = (cross_entropy(logits, tokens.labels, shard) * tokens.loss_mask).double()
        return torch.stack([loss.sum(), tokens.loss_mask.double().sum()])

    return _total(schedule.forward(model, batches, collect), (2,))


def mean_of(sums: Tensor) -> float:
    """Return the mean loss for `loss_sums`.

    Raises:
        MegapruneError: the loss is not finite.
    """
    total, count = sums.tolist()
    loss = total / count if count else float("nan")
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
    """Return the loss of the model under each mask, in nats per token, [number of masks] on the CPU. Collective; the
    result has the same bits on every rank. Arguments as of `mask_sums`.
    """
    sums = mask_sums(model, gate, batches, masks, shard, loss)
    return (sums[:, 0] / sums[:, 1]).float()


def mask_sums(
    model: PipelineModel,
    gate: LayerGate,
    batches: Sequence[schedule.MicroBatch],
    masks: Tensor,
    shard: VocabShard,
    loss: LossKind,
) -> Tensor:
    """Return the sum of the losses under each mask and the number of their tokens, fp64 [number of masks, 2] on the
    CPU. Collective; the result has the same bits on every rank.

    Each micro-batch runs under all masks in turn, so that with KL only one micro-batch's original logits are stored.
    Masks with a common prefix run one after the other and reuse the outputs of the layers in that prefix.

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
    found = torch.empty(len(masks), 2, dtype=torch.float64)
    found[order] = sums
    return parallel.broadcast_from_rank0(found)


def mask_gradient(
    model: PipelineModel,
    gate: LayerGate,
    batches: Sequence[schedule.MicroBatch],
    mask: Tensor,
    shard: VocabShard,
) -> tuple[float, Tensor]:
    """Return KL(original || masked model) in nats per token, and its gradient with respect to the mask, [num_layers],
    on the CPU. Collective; the result has the same bits on every rank. Weights get no gradients.

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
    """Return ShortGPT's block influence (Men et al., 2024): the mean over tokens of 1 - cos(input, output) of each
    layer, in fp32, [num_layers] on the CPU. Collective; the result has the same bits on every rank.

    Tokens without loss are not counted.
    """
    return influence_of(influence_sums(model, batches, num_layers))


def influence_of(sums: Tensor) -> Tensor:
    """Return the block influence for `influence_sums`."""
    return (sums[0] / sums[1]).float()


def influence_sums(model: PipelineModel, batches: Sequence[schedule.MicroBatch], num_layers: int) -> Tensor:
    """Return for each layer the sum of 1 - cos(input, output) and the number of its tokens, fp64 [2, num_layers] on the
    CPU. Collective; the result has the same bits on every rank.
    """
    # per layer: the sum, and its number of tokens (counted once per tensor-parallel rank that holds them)
    sums = torch.zeros(2, num_layers, dtype=torch.float64, device=device.torch_device())
    weights = [torch.ones(())]

    def before(tokens: schedule.LossTokens) -> None:
        weights[0] = own_share(tokens.loss_mask, model)

    def measure(layer: int, entering: Tensor, leaving: Tensor) -> None:
        similarity = torch.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        sums[0, layer] += ((1 - similarity) * weights[0]).sum()
        sums[1, layer] += weights[0].sum()

    with model.watched_layers(measure):
        schedule.forward(model, batches, lambda logits, tokens: None, before)
    return parallel.sum_over_all(sums)


def own_share(weights: Tensor, model: PipelineModel) -> Tensor:
    """Return the part of a micro-batch's weights [s, b] that belongs to the hidden states on this rank."""
    place = parallel.tensor_parallel()
    return weights.chunk(place.size)[place.rank] if model.config.sequence_parallel else weights


def _total(collected: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Sum the last stage's results over micro-batches and replicas. The sum is the same on every rank, on the CPU."""
    total = torch.zeros(shape, dtype=torch.float64, device=device.torch_device())
    if collected:
        total = parallel.sum_over_data_parallel(torch.stack(list(collected)).sum(0))
    return parallel.broadcast_from_last_stage(total.cpu())
