"""Speed of a run: operations per second, and the times of a step's parts on this rank and over all ranks."""

from collections.abc import Sequence
from typing import Any

import torch

from megaprune import device
from megaprune.mcore import parallel
from megaprune.mcore.step_times import StepTimes
from megaprune.models import HFConfig
from megaprune.models.flops import layer_flops, output_flops, step_flops
from megaprune.pruning.options import RunOptions
from megaprune.selection.segments import endpoints

_GIB = 2**30


class Throughput:
    """Measures of each training step.

    Args:
        config: of the model that is pruned; teacher: of its teacher.
    """

    def __init__(self, options: RunOptions, config: HFConfig, teacher: HFConfig) -> None:
        self._options, length = options, options.data.seq_length
        self._layers, self._output = layer_flops(config, length), output_flops(config, length)
        self._teacher = 0.0
        if options.distillation.teaches and options.distillation.teacher != "cached":
            output = output_flops(teacher, length)
            self._teacher = sum(flops.total for flops in layer_flops(teacher, length)) + output.total
        self._peak = options.output.peak_tflops
        if self._peak is None and options.engine.bf16:
            self._peak = device.bf16_tflops(device.model_name())
        self._since: list[list[float]] = []

    def of_step(
        self, iteration: int, seconds: float, data_seconds: float, times: StepTimes, flops: float
    ) -> dict[str, Any]:
        """Return the entries of a step's record. Collective at the end of each `--log-interval`.

        Args:
            iteration: number of the step, from 0.
            data_seconds: time that this rank waited for its data.
            times: of the step, whose work the device has done.
            flops: of the step on all ranks.
        """
        tflops = flops / seconds / parallel.world_size() / 1e12
        found: dict[str, Any] = {"tflops": tflops}
        if self._peak is not None:
            found["mfu"] = tflops / self._peak
        own = [times.compute.take(), times.teacher.take(), data_seconds]
        found |= dict(zip(("compute_seconds", "teacher_seconds", "data_seconds"), own, strict=True))
        memory = device.peak_memory_bytes() / _GIB
        found["memory_gib"] = memory
        self._since.append(own)
        done, options = iteration + 1, self._options
        if done % options.output.log_interval == 0 or done == options.training.train_iters:
            found |= self._over_ranks(memory)
        return found

    def _over_ranks(self, memory: float) -> dict[str, Any]:
        """Return the extremes over all ranks of the means since the last call. Collective."""
        means = torch.tensor(self._since, dtype=torch.float64).mean(0).tolist()
        self._since = []
        compute, teacher, data, peak = zip(*parallel.gathered_numbers([*means, memory]), strict=True)
        return {
            "compute_seconds_min": min(compute),
            "compute_seconds_max": max(compute),
            "slowest_rank": compute.index(max(compute)),
            "teacher_seconds_max": max(teacher),
            "data_seconds_max": max(data),
            "memory_gib_max": max(peak),
        }

    def flops(self, kept_layers: Sequence[int], mask: torch.Tensor | None) -> float:
        """Return the operations of a step on all ranks: the student's forward and backward passes and the teacher's
        forward pass. Adapters, MTP layers and recomputation do not count.

        Args:
            kept_layers: of the pruned model, in recovery.
            mask: of the search; its layers run forward whether they are masked or not.
        """
        training, lora = self._options.training, self._options.lora
        forward = backward = list(kept_layers)
        trains = lora is None
        if mask is not None:
            forward, backward = list(range(len(self._layers))), mask.nonzero().flatten().tolist()
            trains = trains and training.trains_weights_in_search
        trained, trains_output = backward if trains else [], trains
        if mask is None and training.endpoints_only:
            ends = endpoints(kept_layers, len(self._layers))
            trained, trains_output = [kept_layers[place] for place in ends], False
            backward = [layer for layer in kept_layers if layer >= min(trained)]
        own = step_flops(self._layers, self._output, forward, backward, trained, trains_output)
        return (own + self._teacher) * training.global_batch_size
