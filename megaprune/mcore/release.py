"""Release of the memory that training adds to a model: gradient buffers, optimizer state and hooks.

The core's wrappers, buffers and optimizers refer to each other and to the parameters, in cycles: without an explicit
end, all of them stay in memory until the next garbage collection, beside the model that follows.
"""

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel

from megaprune.mcore.pipeline_model import PipelineModel

# What the wrapper and the optimizers attach to parameters.
_ATTACHED = ("main_grad", "main_param", "grad_added_to_main_grad")
# What the wrapper holds: buffers, buckets, and the autograd nodes that its hooks are registered on. Its hooks are the
# nodes' only owners, so that they go with the nodes.
_HELD = (
    *("grad_accs", "params_with_grad", "param_to_bucket_group", "remove_forward_pre_hook_handles"),
    *("buffers", "bucket_groups", "expert_parallel_buffers", "expert_parallel_bucket_groups"),
)


def release_wrappers(wrappers: Iterable[DistributedDataParallel]) -> None:
    """Take Megatron's DDP wrappers off their modules: no hooks, no gradients, no gradient buffers. The modules keep
    their weights.
    """
    for wrapper in wrappers:
        for handle in wrapper.remove_forward_pre_hook_handles.values():
            handle.remove()
        detach_from_training(wrapper.module.parameters())
        for name in _HELD:
            getattr(wrapper, name).clear()


def detach_from_training(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Drop the gradients of parameters, and their references to buffers and to the optimizer's copies."""
    for parameter in parameters:
        parameter.grad = None
        for name in _ATTACHED:
            parameter.__dict__.pop(name, None)


def release_config(model: PipelineModel) -> None:
    """Drop the functions of a training step from the configuration of a model, which otherwise keeps the optimizer."""
    model.config.finalize_model_grads_func = model.config.grad_scale_func = model.config.no_sync_func = None
