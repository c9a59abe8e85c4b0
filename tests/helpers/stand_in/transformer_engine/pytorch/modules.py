"""Modules of Transformer Engine on plain torch. Tensor parallelism uses the core's functions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Module(torch.nn.Module):
    """A module whose state has an entry for FP8, which is empty without FP8."""

    fp8 = fp8_calibration = False

    def get_extra_state(self) -> Tensor:
        """Return the state of FP8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Take the state of FP8."""
        assert state is None or state.numel() == 0

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """Prepare the state of FP8."""
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "recipe": None}


def _weight(rows: int, columns: int, init: Callable[[Tensor], None], mode: str | None, **given: Any) -> Any:
    """Return a weight with the attributes that the core reads."""
    weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=given["params_dtype"], device=given["device"]))
    with torch.no_grad():
        init(weight)
    weight.tensor_model_parallel = mode is not None
    weight.partition_dim, weight.partition_stride = int(mode == "row"), 1
    return weight


def _norm_weight(size: int, sequence_parallel: bool, params_dtype: torch.dtype, device: Any) -> Any:
    weight = torch.nn.Parameter(torch.ones(size, dtype=params_dtype, device=device))
    weight.sequence_parallel = sequence_parallel
    return weight


def _normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)).to(x.dtype)


class RMSNorm(_Module):
    """RMSNorm."""

    def __init__(self, hidden_size: int, eps: float, sequence_parallel: bool, **given: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(hidden_size, sequence_parallel, given["params_dtype"], given["device"])

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalized input."""
        return _normalized(x, self.weight, self.eps)


class Linear(_Module):
    """Linear layer, cut over tensor-parallel ranks by column, by row, or not at all."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        tp_group: Any,
        tp_size: int,
        init_method: Callable[[Tensor], None],
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        **given: Any,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.tp_group, self.return_bias = parallel_mode, tp_group, return_bias
        self.tp_size, self.sequence_parallel, self.use_bias = tp_size, tp_size > 1 and sequence_parallel, bias
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.weight = _weight(self.out_features, self.in_features, init_method, parallel_mode, **given)
        if bias:
            self.bias = torch.nn.Parameter(self.weight.new_zeros(self.out_features))
            self.bias.tensor_model_parallel = parallel_mode == "column"

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Return the output, with the bias separately if it was asked for."""
        output = self._reduced(F.linear(self._gathered(x), self.weight))
        if not self.use_bias:
            return output
        return (output, self.bias) if self.return_bias else output + self.bias

    def _gathered(self, x: Tensor) -> Tensor:
        from megatron.core import tensor_parallel

        if self.parallel_mode != "column" or self.tp_size == 1:
            return x
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _reduced(self, output: Tensor) -> Tensor:
        from megatron.core import tensor_parallel

        if self.parallel_mode != "row" or self.tp_size == 1:
            return output
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(output, group=self.tp_group)


class LayerNormLinear(Linear):
    """RMSNorm and a linear layer."""

    def __init__(self, *args: Any, eps: float, normalization: str, **given: Any) -> None:
        super().__init__(*args, **given)
        assert normalization == "RMSNorm"
        self.eps = eps
        self.layer_norm_weight = _norm_weight(
            self.weight.shape[1], self.sequence_parallel, given["params_dtype"], given["device"]
        )

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """Return the output, with the bias separately if it was asked for."""
        return super().forward(_normalized(x, self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    """A linear layer for each expert."""

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        *,
        init_method: Callable[[Tensor], None],
        bias: bool,
        parallel_mode: str | None,
        tp_size: int,
        **given: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        self.init_fp8_metadata(num_gemms)
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        for number in range(num_gemms):
            self.register_parameter(f"weight{number}", _weight(rows, columns, init_method, parallel_mode, **given))

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        """Return the outputs of the experts for their tokens, which follow each other."""
        parts = x.split(m_splits)
        return torch.cat([F.linear(part, getattr(self, f"weight{number}")) for number, part in enumerate(parts)])


class DotProductAttention(_Module):
    """Causal attention."""

    def __init__(self, *, softmax_scale: float | None, **given: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale
        self.register_load_state_dict_post_hook(_forgive_extra_state)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *masks: Any, **given: Any) -> Tensor:
        """Return the attention output [s, b, n * dv]."""
        batched = [part.permute(1, 2, 0, 3) for part in (query, key, value)]
        output = F.scaled_dot_product_attention(*batched, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
        return output.permute(2, 0, 1, 3).flatten(2)


def _forgive_extra_state(module: torch.nn.Module, incompatible: Any) -> None:
    """Let checkpoints lack the attention's state, which the core does not save."""
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if not key.endswith("_extra_state")]
