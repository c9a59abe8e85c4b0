"""Passes that measure and change nothing: validation loss, and the harm that each layer's removal does."""

from collections.abc import Sequence

import torch
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


def layer_kl(
    model: torch.nn.Module, gate: LayerGate, batches: Sequence[passes.MicroBatch], num_layers: int, shard: VocabShard
) -> Tensor:
    """KL(original || model without layer l) in nats per token, for every layer, [num_layers] (E3-Pruner's initial
    scores). Collective.

    Each micro-batch runs once whole and once without each layer, one after the other through the pipeline, so that
    one micro-batch's original logits are all that is kept.
    """
    masks: list[Tensor | None] = [None]
    masks += [torch.ones(num_layers).index_fill(0, torch.tensor(layer), 0.0) for layer in range(num_layers)]
    variants = len(masks)
    runs = [batch for batch in batches for _ in masks]
    reference: list[Tensor] = []

    def before(number: int) -> None:
        gate.set(masks[number % variants], device.torch_device())

    def collect(logits: Tensor, number: int) -> Tensor:
        sums = torch.zeros(variants, dtype=torch.float64, device=logits.device)
        loss_mask = runs[number].loss_mask.t().to(logits.device)
        if number % variants == 0:
            reference[:] = [logits]
            sums[0] = loss_mask.sum()
        else:
            sums[number % variants] = (full_kl(reference[0], logits, shard) * loss_mask).sum()
        return sums

    sums = _total(passes.forward(model, runs, collect, before), variants)
    gate.set(None)
    return (sums[1:] / sums[0]).float()


def _total(collected: Sequence[Tensor], size: int) -> Tensor:
    """Sums what the last stage collected over micro-batches and replicas; the same on every rank, on the CPU."""
    total = torch.zeros(size, dtype=torch.float64, device=device.torch_device())
    if collected:
        total = parallel.sum_over_data_parallel(torch.stack(list(collected)).sum(0))
    return parallel.from_last_stage(total.cpu())
