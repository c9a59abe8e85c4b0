"""Training state of a model: Megatron's DDP wrapper, optimizer and learning-rate schedule."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

import megaprune.mcore.gradient_norm  # noqa: F401  (see there)
from megaprune.mcore.averaging import WeightAverage
from megaprune.mcore.builder import EngineOptions, in_half_precision, is_gated
from megaprune.mcore.layers.lora import adapted_layers
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.mcore.release import detach_from_training, release_config, release_wrappers
from megaprune.mcore.step_times import StepTimes
from megaprune.utils.errors import UsageError


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of Adam with decoupled weight decay and of its learning-rate schedule over `train_iters` iterations.

    Args:
        averaged_from: the first iteration whose weights count in the average; None keeps no average.
    """

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
    averaged_from: int | None = None


class Trainer:
    """Wrapped model, optimizer and learning-rate schedule.

    Args:
        model: this rank's part of the model; only parameters that require gradients are trained.
        engine: precision of the run.
        options: optimizer and learning-rate schedule.
    """

    def __init__(self, model: PipelineModel, engine: EngineOptions, options: OptimizerOptions) -> None:
        self.model = model
        self.times = StepTimes()
        self.adapters_only = bool(adapted_layers(model))
        model.config.finalize_model_grads_func = finalize_model_grads
        # An overlapped reduction would wait for the gradients of layers whose backward pass is skipped.
        overlaps = engine.overlap_grad_reduce and not is_gated(model)
        ddp_config = _ddp_config(engine, options, overlaps)
        self._wrappers = [
            DistributedDataParallel(model.config, ddp_config, chunk)
            for chunk in in_half_precision(model, engine).scheduled
        ]
        if overlaps:  # gradients are reduced in the last micro-batch alone
            model.config.no_sync_func = self._wrappers[0].no_sync
        self.ddp = PipelineModel(model.chunks, self._wrappers).train()
        self.optimizer: MegatronOptimizer = get_megatron_optimizer(
            _optimizer_config(engine, options),
            self.ddp.scheduled,
        )
        model.config.grad_scale_func = self.optimizer.scale_loss
        self._options = options
        self.average = None if options.averaged_from is None else WeightAverage(model, options.averaged_from)
        self._schedule = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=options.lr,
            min_lr=options.min_lr,
            lr_warmup_steps=options.lr_warmup_iters,
            # Must be positive and exceed the warm-up, even if a model is only evaluated (train_iters 0).
            lr_decay_steps=max(options.train_iters, options.lr_warmup_iters + 1),
            lr_decay_style=options.lr_decay_style,
            start_wd=options.weight_decay,
            end_wd=options.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    def zero_grad(self) -> None:
        """Clear all gradients; call it before the passes of an iteration."""
        for wrapper in self._wrappers:
            wrapper.zero_grad_buffer()
        self.optimizer.zero_grad()

    def step(self, iteration: int) -> tuple[float, float | None]:
        """Update the weights with the gradients of an iteration. Collective.

        Args:
            iteration: number of the iteration, from 0.

        Returns:
            The learning rate used, and the gradient norm before clipping (None without clipping).
        """
        self._schedule.num_steps = 0
        self._schedule.step(increment=self._steps_into_schedule(iteration))
        _, grad_norm, _ = self.optimizer.step()
        if self.average is not None:
            self.average.add(iteration)
        return self._schedule.get_lr(self.optimizer.param_groups[0]), grad_norm

    def close(self) -> None:
        """End the training: free the gradient buffers, the optimizer's state and the average. The model keeps its
        weights, in `model`; nothing else of the trainer can be used afterwards.
        """
        if not self._wrappers:
            return
        release_wrappers(self._wrappers)
        detach_from_training(self.model.parameters())
        release_config(self.model)
        for part in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            part.__dict__.clear()  # a part refers to buffers, copies of weights and itself
        self._wrappers, self.average = [], None
        del self.ddp, self.optimizer, self._schedule

    def _steps_into_schedule(self, iteration: int) -> int:
        """Return the position in the schedule of an iteration (from 0).

        As in Megatron-LM, an iteration after the warm-up uses the learning rate at its beginning: the decay starts at
        the maximum and reaches the minimum after the last iteration. A warm-up iteration uses the learning rate at its
        end, because the rate at the beginning of the first one is 0.
        """
        return iteration + 1 if iteration < self._options.lr_warmup_iters else iteration


def check_training_configs(engine: EngineOptions, options: OptimizerOptions) -> None:
    """Check that Megatron-Core accepts the configurations of the optimizer and of the gradients' reduction.

    Raises:
        UsageError: it does not.
    """
    try:
        _ddp_config(engine, options, engine.overlap_grad_reduce)
        _optimizer_config(engine, options)
    except (AssertionError, ImportError, ValueError) as error:
        raise UsageError(f"Megatron-Core refuses the options of --override: {' '.join(str(error).split())}") from None


def _ddp_config(engine: EngineOptions, options: OptimizerOptions, overlaps: bool) -> DistributedDataParallelConfig:
    fields: dict[str, Any] = dict(
        grad_reduce_in_fp32=True, overlap_grad_reduce=overlaps, use_distributed_optimizer=options.distributed
    )
    return DistributedDataParallelConfig(**{**fields, **engine.overrides.ddp})


def _optimizer_config(engine: EngineOptions, options: OptimizerOptions) -> OptimizerConfig:
    fields: dict[str, Any] = dict(
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
    )
    return OptimizerConfig(**{**fields, **engine.overrides.optimizer})
