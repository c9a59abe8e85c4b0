"""Passes that measure and change nothing: validation loss, and the loss of the model without some of its layers."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from megaprune import device
from megaprune.distillation.losses import VocabShard, cross_entropy, full_kl
from megaprune.errors import MegapruneError
from megaprune.mcore import parallel, passes
from megaprune.mcore.gated_layer import LayerGate, frozen, layers_of

# KL(original || masked model), or cross-entropy with the data.
LossOfMasks = Literal["kl", "ce"]


def mean_loss(model: torch.nn.Module, batches: Sequence[passes.MicroBatch], shard: VocabShard) -> float:
    """Mean next-token cross-entropy in nats over the tokens that the batches' loss masks count. Collective.

    Args:
        batches: this replica's share of the data.

    Raises:
        MegapruneError: the loss is not finite.
    """

    def collect(logits: Tensor, number: int) -> Tensor:
        labels, loss_mask = (x.t().to(logits.device) for x in (batches[number].labels, batches[number].loss_mask))
        loss = (cross_entropy(logits, labels, shard) * loss_mask).double()
        return torch.stack([loss.sum(), loss_mask.double().sum()])

    total, count = _total(passes.forward(model, batches, collect), (2,)).tolist()
    loss = total / count
    if not loss < float("inf"):
        raise MegapruneError(f"the validation loss is {loss}: the model or --valid-data is damaged")
    return loss


def mask_losses(
    model: torch.nn.Module,
    gate: LayerGate,
    batches: Sequence[passes.MicroBatch],
    masks: Tensor,
    shard: VocabShard,
    loss: LossOfMasks,
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

    def before(number: int) -> None:
        if number % len(rows) == 0:
            gate.forget()
        gate.set(rows[number % len(rows)], device.torch_device())

    def collect(logits: Tensor, number: int) -> Tensor:
        batch = runs[number]
        if rows[number % len(rows)] is None:
            reference[:] = [logits]
            return torch.zeros(2, dtype=torch.float64, device=logits.device)
        if loss == "kl":
            losses = full_kl(reference[0], logits, shard)
        else:
            losses = cross_entropy(logits, batch.labels.t().to(logits.device), shard)
        loss_mask = batch.loss_mask.t().to(logits.device)
        return torch.stack([(losses * loss_mask).sum(), loss_mask.sum()]).double()

    with gate.sharing_prefixes():
        collected = passes.forward(model, runs, collect, before)
    gate.set(None)
    of_rows = [torch.stack(collected[row :: len(rows)]).sum(0) for row in range(len(rows))] if collected else []
    sums = _total([torch.stack(of_rows)] if of_rows else [], (len(rows), 2))[len(rows) - len(masks) :]
    found = torch.empty(len(masks), dtype=torch.float64)
    found[order] = sums[:, 0] / sums[:, 1]
    return parallel.of_first_rank(found).float()


def shared_order(masks: Tensor) -> list[int]:
    """The order in which masks [n, num_layers] share the most layers with the one before: the whole model first."""
    return sorted(range(len(masks)), key=lambda i: [-value for value in masks[i].tolist()])


def shared_cost(masks: Tensor, loss: LossOfMasks) -> float:
    """What `mask_losses` computes of hard masks [n, num_layers], in passes through the whole model's layers."""
    layers, before = 0, [1.0] * masks.shape[1] if loss == "kl" else []
    layers += len(before)
    for i in shared_order(masks):
        mask = masks[i].tolist()
        same = next((j for j, pair in enumerate(zip(mask, before, strict=False)) if pair[0] != pair[1]), len(before))
        layers += sum(value != 0 for value in mask[same:])
        before = mask
    return layers / masks.shape[1]


def mask_gradient(
    model: torch.nn.Module,
    gate: LayerGate,
    batches: Sequence[passes.MicroBatch],
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
            references = passes.forward(model, batches, lambda logits, number: logits.detach().clone())
        gate.set(mask, device.torch_device())
        mean = passes.mean_token_loss(
            model,
            batches,
            lambda number: batches[number].loss_mask.t().to(device.torch_device()),
            lambda logits, number: full_kl(references[number], logits, shard),
        )
    grad = parallel.reduce_mask_gradient(gate.take_gradient(), model.config.sequence_parallel)
    gate.set(None)
    return mean, grad


def block_influence(model: torch.nn.Module, batches: Sequence[passes.MicroBatch], num_layers: int) -> Tensor:
    """ShortGPT's block influence (Men et al., 2024): the mean over tokens of 1 - cos(layer's input, its output), in
    fp32, [num_layers] on the CPU, the same bits on every rank. Collective.

    Tokens that carry no loss don't count.
    """
    layers = layers_of(model)
    sequence_parallel = model.config.sequence_parallel
    # of each layer: the sum, and how many tokens are in it (as often as tensor-parallel ranks that hold them)
    sums = torch.zeros(2, num_layers, dtype=torch.float64, device=device.torch_device())
    weights = [torch.ones(())]

    def before(number: int) -> None:
        whole = batches[number].loss_mask.t().to(sums.device)
        place = parallel.tensor_parallel()
        weights[0] = whole.chunk(place.size)[place.rank] if sequence_parallel else whole

    def measure(layer: torch.nn.Module, args: tuple, kwargs: dict, output: tuple) -> None:
        entered = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        similarity = torch.cosine_similarity(entered.float(), output[0].float(), dim=-1)
        sums[0, layer.layer_number - 1] += ((1 - similarity) * weights[0]).sum()
        sums[1, layer.layer_number - 1] += weights[0].sum()

    hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in layers]
    try:
        passes.forward(model, batches, lambda logits, number: None, before)
    finally:
        for hook in hooks:
            hook.remove()
    total, count = parallel.sum_over_all(sums)
    return (total / count).float()


def _total(collected: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
    """Sums what the last stage collected over micro-batches and replicas; the same on every rank, on the CPU."""
    total = torch.zeros(shape, dtype=torch.float64, device=device.torch_device())
    if collected:
        total = parallel.sum_over_data_parallel(torch.stack(list(collected)).sum(0))
    return parallel.from_last_stage(total.cpu())
