"""A model in training: Megatron's DDP, optimizer and learning-rate schedule around it."""

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megaprune.mcore.builder import EngineOptions, in_half_precision
from megaprune.mcore.layers.lora import adapted_layers


@dataclass(frozen=True)
class OptimizerOptions:
    """Adam with decoupled weight decay, and the schedule of its learning rate over ``train_iters`` iterations."""

    lr: float
    min_lr: float
    lr_decay_style: str
    lr_warmup_iters: int
    train_iters: int
    weight_decay: float
    clip_grad: float
    distributed: bool = False
    beta1: float = 0.9
    beta2: float = 0.95


class Trainer:
    """Owns the wrapped model, its optimizer and its schedule."""

    def __init__(self, model: GPTModel, engine: EngineOptions, options: OptimizerOptions) -> None:
        self.model = model
        self.adapters_only = bool(adapted_layers(model))
        model.config.finalize_model_grads_func = finalize_model_grads
        self.ddp = DistributedDataParallel(
            model.config,
            # No overlap with the backward pass: it would wait for gradients of layers whose backward is skipped.
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=False,
                use_distributed_optimizer=options.distributed,
            ),
            in_half_precision(model, engine),
        )
        self.ddp.train()
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=options.lr,
                min_lr=options.min_lr,
                weight_decay=options.weight_decay,
                adam_beta1=options.beta1,
                adam_beta2=options.beta2,
                clip_grad=options.clip_grad,
                bf16=engine.bf16,
                params_dtype=torch.bfloat16 if engine.bf16 else torch.float32,
                use_distributed_optimizer=options.distributed,
            ),
            [self.ddp],
        )
        model.config.grad_scale_func = self.optimizer.scale_loss
        self._options = options
        self._schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=options.lr_warmup_iters,
            # positive, and beyond the warm-up, also where nothing is trained but a model is only measured
            lr_decay_steps=max(options.train_iters, options.lr_warmup_iters + 1),
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def zero_grad(self) -> None:
        """Clears gradients before a step."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, iteration: int) -> tuple[float, float | None]:
        """Applies the gradients of an iteration (from 0).

        Returns:
            The learning rate used, and the gradient's norm before clipping (None without clipping).
        """
        self._schedule.num_steps = 0
        self._schedule.step(increment=self._steps_into_schedule(iteration))
        _, grad_norm, _ = self.optimizer.step()
        return self._schedule.get_lr(self.optimizer.param_groups[0]), grad_norm

    def _steps_into_schedule(self, iteration: int) -> int:
        """Where in the schedule an iteration (from 0) is made.

        As in Megatron-LM, an iteration behind the warm-up uses the value that holds when it begins: the decay starts at
        the highest rate, and reaches the lowest when all iterations are done. An iteration of the warm-up uses the
        value at its end, for at its beginning the first one would have a rate of 0.
        """
        return iteration + 1 if iteration < self._options.lr_warmup_iters else iteration
