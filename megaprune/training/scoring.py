"""Passes that measure and change nothing: validation loss, and the loss of the model without some of its layers."""

from collections.abc import Sequence
from typing import Literal

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megaprune import device
from megaprune.distillation.losses import VocabShard, cross_entropy, full_kl
from megaprune.errors import MegapruneError
from megaprune.mcore import parallel, passes
from megaprune.mcore.gated_layer import LayerGate


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

    total, count = _total(passes.forward(model, batches, collect), 2).tolist()
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
    loss: Literal["kl", "ce"],
) -> Tensor:
    """The loss of the model under each mask, in nats per token, [number of masks] on the CPU, the same bits on every
    rank. Collective.

    Each micro-batch runs under all masks, one after the other through the pipeline, so that for KL one micro-batch's
    original logits are all that is kept.

    Args:
        masks: [number of masks, num_layers]; 1 keeps a layer.
        loss: KL(original || masked model), or cross-entropy with the data.
    """
    rows: list[Tensor | None] = [*([None] if loss == "kl" else []), *masks]
    runs = [batch for batch in batches for _ in rows]
    reference: list[Tensor] = []

    def before(number: int) -> None:
        gate.set(rows[number % len(rows)], device.torch_device())

    def collect(logits: Tensor, number: int) -> Tensor:
        batch, row = runs[number], number % len(rows)
        sums = torch.zeros(len(rows) + 1, dtype=torch.float64, device=logits.device)
        loss_mask = batch.loss_mask.t().to(logits.device)
        if row == 0:
            sums[-1] = loss_mask.sum()
        if rows[row] is None:
            reference[:] = [logits]
            return sums
        if loss == "kl":
            losses = full_kl(reference[0], logits, shard)
        else:
            losses = cross_entropy(logits, batch.labels.t().to(logits.device), shard)
        sums[row] = (losses * loss_mask).sum()
        return sums

    sums = _total(passes.forward(model, runs, collect, before), len(rows) + 1)
    gate.set(None)
    return parallel.of_first_rank(sums[len(rows) - len(masks) : -1] / sums[-1]).float()


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
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with gate.all_layers():
        references = passes.forward(model, batches, lambda logits, number: logits.detach().clone())
    gate.set(mask, device.torch_device())
    scale = 0.0
    if parallel.is_last_stage():
        counts = [batch.loss_mask.sum() for batch in batches]
        total = parallel.sum_over_data_parallel(torch.stack(counts).sum().to(device.torch_device()))
        scale = len(batches) * parallel.data_parallel_size() / total

    def loss(logits: Tensor, number: int) -> Tensor:
        loss_mask = batches[number].loss_mask.t().to(logits.device)
        return (full_kl(references[number], logits, shard) * loss_mask).sum() * scale

    losses = passes.forward_backward(model, batches, loss)
    mean = torch.zeros((), device=device.torch_device())
    if losses:
        mean = parallel.sum_over_data_parallel(torch.stack(losses).mean()) / parallel.data_parallel_size()
    config = next(module.config for module in model.modules() if isinstance(module, TransformerLayer))
    grad = parallel.reduce_mask_gradient(gate.take_gradient(), config.sequence_parallel)
    gate.set(None)
    for parameter in frozen:
        parameter.requires_grad_(True)
    return parallel.from_last_stage(mean.item()), grad


def block_influence(model: torch.nn.Module, batches: Sequence[passes.MicroBatch], num_layers: int) -> Tensor:
    """ShortGPT's block influence (Men et al., 2024): the mean over tokens of 1 - cos(layer's input, its output), in
    fp32, [num_layers] on the CPU, the same bits on every rank. Collective.

    Tokens that carry no loss don't count.
    """
    layers = [module for module in model.modules() if isinstance(module, TransformerLayer)]
    sequence_parallel = bool(layers and layers[0].config.sequence_parallel)
    # of each layer: the sum, and how many tokens are in it (as often as tensor-parallel ranks that hold them)
    sums = torch.zeros(2, num_layers, dtype=torch.float64, device=device.torch_device())
    weights = [torch.ones(())]

    def before(number: int) -> None:
        whole = batches[number].loss_mask.t().to(sums.device)
        place = parallel.tensor_parallel()
        weights[0] = whole.chunk(place.size)[place.rank] if sequence_parallel else whole

    def measure(layer: TransformerLayer, args: tuple, kwargs: dict, output: tuple) -> None:
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


def _total(collected: Sequence[Tensor], size: int) -> Tensor:
    """Sums what the last stage collected over micro-batches and replicas; the same on every rank, on the CPU."""
    total = torch.zeros(size, dtype=torch.float64, device=device.torch_device())
    if collected:
        total = parallel.sum_over_data_parallel(torch.stack(list(collected)).sum(0))
    return parallel.from_last_stage(total.cpu())
