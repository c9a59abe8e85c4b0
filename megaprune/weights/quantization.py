"""Detection of quantized checkpoints in formats that are not read, by their configs or the names of their tensors."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megaprune.models import HFConfig
from megaprune.weights.fp8 import BLOCK
from megaprune.weights.quantized import declared_format, quantization_settings

# Files beside config.json, as glob patterns, and whose they are. transformers reads none of them; other engines do.
BESIDE = {
    "hf_quant_config.json": "TensorRT Model Optimizer",
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "quantization_config.json": "a quantizer",
    "quant_model_description*.json": "Ascend's msModelSlim",
    "quanto_qmap.json": "quanto",
}
# Keys of config.json: transformers', compressed-tensors' of old, MLX's.
_KEYS = ("quantization_config", "compression_config", "quantization")
# Ends of the names that quantized tensors and what belongs to them have.
_ENDS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "compressed-tensors or TensorRT Model Optimizer",
    ".weight_scale_2": "TensorRT Model Optimizer",
    ".input_scale": "compressed-tensors or TensorRT Model Optimizer",
    ".weight_offset": "Ascend's msModelSlim",
    ".deq_scale": "Ascend's msModelSlim",
    ".weight.absmax": "bitsandbytes",
    ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".scales": "GPTQ, AWQ or MLX",
    "_proj_blocks": "MXFP4",
}


def declared_quantization(folder: Path, config: HFConfig) -> str | None:
    """Return a description of the quantization that config.json or a file beside it declares; None if supported."""
    for key in _KEYS:
        settings = quantization_settings(config) if key == _KEYS[0] else config.get(key)
        if settings and not (key == _KEYS[0] and declared_format(config)):
            return (
                f"config.json says {_in_words(settings)}, but only MXFP4 and FP8 in blocks of [{BLOCK}, {BLOCK}] are "
                "read, and of compressed-tensors FP8 by rows and symmetric INT4 in groups"
            )
    for pattern, whose in BESIDE.items():
        for path in sorted(Path(folder).glob(pattern)):
            settings = _read(path)
            if not _declares_nothing(settings):
                return f"{path.name} says {_in_words(settings)} ({whose}); remove that file if the weights are not"
    return None


def quantized_tensor(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first tensor name that belongs to a quantized model, and the format that stores it so."""
    return next(((name, whose) for name in names for end, whose in _ENDS.items() if name.endswith(end)), None)


def _declares_nothing(settings: Any) -> bool:
    """Return whether settings declare no quantization of weights. TensorRT Model Optimizer may quantize only the KV
    cache.
    """
    inner = settings.get("quantization") if isinstance(settings, dict) else None
    return isinstance(inner, dict) and "quant_algo" in inner and inner["quant_algo"] is None


def _in_words(settings: Any) -> str:
    if not isinstance(settings, dict):
        return "so"
    if isinstance(settings.get("quantization"), dict):
        settings = settings["quantization"]
    named = [
        *("quant_method", "quant_algo", "model_quant_type", "format", "bits", "w_bit", "group_size", "q_group_size"),
        "weight_block_size",
    ]
    said = [f"{key} {settings[key]}" for key in named if settings.get(key) is not None]
    return ", ".join(said) or "so"


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
