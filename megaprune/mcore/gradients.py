"""Shortened LLaMA's first-order importance of layers: how much the loss would change without their weights."""

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megaprune import device
from megaprune.mcore import parallel, schedule
from megaprune.mcore.layers.gated import layers_of


def taylor_importance(
    model: torch.nn.Module,
    batches: Sequence[schedule.MicroBatch],
    weights: Callable[[schedule.LossTokens], Tensor],
    token_losses: Callable[[Tensor, schedule.LossTokens], Tensor],
    num_layers: int,
) -> Tensor:
    """The sum over a layer's weights of |weight x its gradient| (Kim et al., 2024), [num_layers] fp32 on the CPU, the
    same bits on every rank. Collective; for as long as it runs, the model's gradients take their room.

    Args:
        weights, token_losses: as for `schedule.mean_token_loss`.
    """
    before = model.config.finalize_model_grads_func
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False), model
    )
    sums = torch.zeros(num_layers, dtype=torch.float64, device=device.torch_device())
    try:
        wrapped.zero_grad_buffer()
        schedule.mean_token_loss(wrapped, batches, weights, token_losses)
        with torch.no_grad():
            for layer in layers_of(model):
                for name, parameter in layer.named_parameters():
                    change = (parameter.float() * parameter.main_grad).abs().sum(dtype=torch.float64)
                    sums[layer.layer_number - 1] += change / _holders(name, parameter)
    finally:
        model.config.finalize_model_grads_func = before
        # with the wrapper go its hooks and the gradients' buffers
        for parameter in model.parameters():
            parameter.__dict__.pop("main_grad", None)
            parameter.grad = None
        del wrapped
    return parallel.sum_over_all(sums).float()


def _holders(name: str, parameter: torch.nn.Parameter) -> int:
    """How many ranks of a pipeline stage hold this shard of a weight."""
    ranks = parallel_state.get_model_parallel_group().size() // parallel_state.get_pipeline_model_parallel_world_size()
    ranks *= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    cut = getattr(parameter, "tensor_model_parallel", False)
    if ".experts." in name:
        shards = parallel_state.get_expert_model_parallel_world_size()
        return ranks // (shards * (parallel_state.get_expert_tensor_parallel_world_size() if cut else 1))
    return ranks // (parallel_state.get_tensor_model_parallel_world_size() if cut else 1)
