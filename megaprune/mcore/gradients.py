"""First-order (Taylor) importance of layers, as in Shortened LLaMA (Kim et al., 2024)."""

from collections.abc import Callable, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from torch import Tensor

from megaprune import device
from megaprune.mcore import parallel, schedule
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.release import release_wrappers


def taylor_importance(
    model: PipelineModel,
    batches: Sequence[schedule.MicroBatch],
    weights: Callable[[schedule.LossTokens], Tensor],
    token_losses: Callable[[Tensor, schedule.LossTokens], Tensor],
    num_layers: int,
) -> Tensor:
    """Return the importance of each layer: the sum of |weight x gradient| over its weights. Collective.

    While it runs, fp32 gradients of the whole model are in memory.

    Args:
        model: this rank's part of the model.
        batches: micro-batches of this rank.
        weights: as in `schedule.mean_token_loss`.
        token_losses: as in `schedule.mean_token_loss`.
        num_layers: number of layers of the whole model.

    Returns:
        [num_layers] fp32 on the CPU, bitwise identical on every rank.
    """
    config = model.config
    before = config.finalize_model_grads_func
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    wrappers = [DistributedDataParallel(config, ddp_config, chunk) for chunk in model.scheduled]
    sums = torch.zeros(num_layers, dtype=torch.float64, device=device.torch_device())
    try:
        for wrapper in wrappers:
            wrapper.zero_grad_buffer()
        schedule.mean_token_loss(PipelineModel(model.chunks, wrappers), batches, weights, token_losses)
        with torch.no_grad():
            for number, layer in model.layers():
                for name, parameter in layer.named_parameters():
                    change = (parameter.float() * parameter.main_grad).abs().sum(dtype=torch.float64)
                    sums[number] += change / _holders(name, parameter)
    finally:
        config.finalize_model_grads_func = before
        release_wrappers(wrappers)
        device.free_unused()
    return parallel.sum_over_all(sums).float()


def _holders(name: str, parameter: torch.nn.Parameter) -> int:
    """Return the number of ranks of a pipeline stage that hold this shard of a weight."""
    ranks = parallel_state.get_model_parallel_group().size() // parallel_state.get_pipeline_model_parallel_world_size()
    ranks *= parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    cut = getattr(parameter, "tensor_model_parallel", False)
    if ".experts." in name:
        shards = parallel_state.get_expert_model_parallel_world_size()
        return ranks // (shards * (parallel_state.get_expert_tensor_parallel_world_size() if cut else 1))
    return ranks // (parallel_state.get_tensor_model_parallel_world_size() if cut else 1)
