"""Formats of quantized weights that are read, behind one interface. A weight is dequantized as it streams.

A quantized weight is stored in a main tensor and in companions beside it, which may be in other files. A new format is
a class here, listed in `FORMATS`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from megaprune.models import HFConfig
from megaprune.weights import fp8, int4, mxfp4
from megaprune.weights.dtypes import FP8, SCALE_DTYPES, WEIGHT_DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    # of a stored tensor, by its suffix: reads the slice [start:stop] along a dimension, all of it for (0, 0, None)
    Read = Callable[[str, int, int, int | None], torch.Tensor]

Shape = tuple[int, ...]


class Format(Protocol):
    """A way of storing quantized matrices.

    Attributes:
        name: for messages.
        main: what the name of the main tensor adds to the weight's.
        dtype: of the main tensor, by its safetensors name.
        companions: what the names of the companions add to the weight's, with the dtypes that they may have.
    """

    name: str
    main: str
    dtype: str
    companions: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, settings: Any) -> Format | None:
        """Return the format if ``quantization_config`` describes it."""
        ...

    def shape(self, stored: Shape) -> Shape:
        """Return the shape of a weight from that of its main tensor."""
        ...

    def companion_shape(self, suffix: str, shape: Shape) -> Shape:
        """Return the shape that a companion of a weight of this shape must have."""
        ...

    def read(
        self, read: Read, shape: Shape, dim: int, start: int, stop: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the slice ``[start:stop]`` of a weight along a dimension, in bf16.

        Args:
            shape: the whole weight's.
            out: memory for the result, if the slice is the whole weight.
        """
        ...


class BlockFP8:
    """FP8 with a scale for each block of 128 x 128 (DeepSeek, MiniMax)."""

    name, main, dtype = "FP8 in blocks", "", FP8
    companions: dict[str, tuple[str, ...]] = {fp8.SCALE_SUFFIX: SCALE_DTYPES}

    @classmethod
    def of(cls, settings: Any) -> Format | None:
        """Return the format if the settings describe blocks of this size."""
        fits = isinstance(settings, dict) and settings.get("quant_method") == "fp8"
        return cls() if fits and settings.get("weight_block_size") == [fp8.BLOCK, fp8.BLOCK] else None

    def shape(self, stored: Shape) -> Shape:
        """Return the shape unchanged."""
        return stored

    def companion_shape(self, suffix: str, shape: Shape) -> Shape:
        """Return the number of blocks in each dimension."""
        return fp8.scale_shape(shape)

    def read(
        self, read: Read, shape: Shape, dim: int, start: int, stop: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the slice; the scales are read whole."""
        weight, scale = read("", dim, start, stop), read(fp8.SCALE_SUFFIX, 0, 0, None)
        return fp8.dequantize(weight, scale, start if dim == 0 else 0, start if dim == 1 else 0, out)


class ChannelFP8:
    """FP8 with a scale for each row, by compressed-tensors (GLM-4.5 and later)."""

    name, main, dtype = "FP8 by rows", "", FP8
    companions: dict[str, tuple[str, ...]] = {"_scale": WEIGHT_DTYPES}

    @classmethod
    def of(cls, settings: Any) -> Format | None:
        """Return the format if the settings describe FP8 weights with a scale for each row."""
        groups = _groups(settings, "float-quantized")
        expected = {"type": "float", "num_bits": 8, "strategy": "channel"}
        return cls() if groups and all(group.items() >= expected.items() for group in groups) else None

    def shape(self, stored: Shape) -> Shape:
        """Return the shape unchanged."""
        return stored

    def companion_shape(self, suffix: str, shape: Shape) -> Shape:
        """Return one scale for each row."""
        return (shape[0], 1)

    def read(
        self, read: Read, shape: Shape, dim: int, start: int, stop: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the slice."""
        import torch

        weight = read("", dim, start, stop)
        scale = read("_scale", 0, start, stop) if dim == 0 else read("_scale", 0, 0, None)
        product = weight.float().mul_(scale.float())
        return product.to(torch.bfloat16) if out is None else out.copy_(product)


class PackedInt4:
    """INT4, eight numbers in an int32, with a scale for each group of columns, by compressed-tensors (Kimi-K2)."""

    name, main, dtype = "INT4 in groups", "_packed", "I32"
    companions: dict[str, tuple[str, ...]] = {"_scale": WEIGHT_DTYPES, "_shape": ("I64", "I32")}

    def __init__(self, group: int) -> None:
        self.group = group

    @classmethod
    def of(cls, settings: Any) -> Format | None:
        """Return the format if the settings describe symmetric INT4 weights in groups of columns, in order."""
        groups = _groups(settings, "pack-quantized")
        expected = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group"}
        sizes = {group.get("group_size") for group in groups}
        size = sizes.pop() if len(sizes) == 1 else None
        fits = all(group.items() >= expected.items() and not group.get("actorder") for group in groups)
        return cls(size) if fits and type(size) is int and size > 0 else None

    def shape(self, stored: Shape) -> Shape:
        """Return the shape of the unpacked numbers."""
        return (*stored[:-1], stored[-1] * int4.PER_WORD)

    def companion_shape(self, suffix: str, shape: Shape) -> Shape:
        """Return a scale for each group; a shape has two numbers."""
        return (2,) if suffix == "_shape" else (shape[0], -(-shape[1] // self.group))

    def read(
        self, read: Read, shape: Shape, dim: int, start: int, stop: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the slice; of a slice of columns, all words that contain one are read."""
        if dim == 0:
            return int4.dequantize(read("_packed", 0, start, stop), read("_scale", 0, start, stop), self.group, out=out)
        start, stop, _ = slice(start, stop).indices(shape[1])
        first, last = start // int4.PER_WORD, -(-stop // int4.PER_WORD)
        words, scale = read("_packed", 1, first, last), read("_scale", 0, 0, None)
        whole = int4.dequantize(words, scale, self.group, first * int4.PER_WORD)
        return whole[:, start - first * int4.PER_WORD :][:, : stop - start]


class MXFP4:
    """FP4 with an exponent for each 32 numbers (GPT-OSS). Weights are [in, out], what is stored is [out, in]."""

    name, main, dtype = "MXFP4", "_blocks", "U8"
    companions: dict[str, tuple[str, ...]] = {"_scales": ("U8", "F8_E8M0")}

    @classmethod
    def of(cls, settings: Any) -> Format | None:
        """Return the format if the settings name it."""
        return cls() if isinstance(settings, dict) and settings.get("quant_method") == "mxfp4" else None

    def shape(self, stored: Shape) -> Shape:
        """Return the shape of the weight [in, out]."""
        return (stored[1] * stored[2] * mxfp4.PER_BYTE, stored[0])

    def companion_shape(self, suffix: str, shape: Shape) -> Shape:
        """Return an exponent for each block."""
        return (shape[1], shape[0] // mxfp4.BLOCK)

    def read(
        self, read: Read, shape: Shape, dim: int, start: int, stop: int | None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the slice; of a slice of rows, all blocks that contain one are read."""
        start, stop, _ = slice(start, stop).indices(shape[dim])
        if dim == 1 or (start, stop) == (0, shape[0]):
            rows = (0, start, stop) if dim == 1 else (0, 0, None)
            found = mxfp4.dequantize(read("_blocks", *rows), read("_scales", *rows)).t()
            return found if out is None else out.copy_(found)
        first, last = start // mxfp4.BLOCK, -(-stop // mxfp4.BLOCK)
        found = mxfp4.dequantize(read("_blocks", 1, first, last), read("_scales", 1, first, last)).t()
        return found[start - first * mxfp4.BLOCK :][: stop - start]


BLOCK_FP8 = BlockFP8()
FORMATS: tuple[type[Format], ...] = (BlockFP8, ChannelFP8, PackedInt4, MXFP4)


def quantization_settings(config: HFConfig) -> Any:
    """Return ``quantization_config``, of the language model if it is nested."""
    nested = config.get("text_config")
    inner = nested.get("quantization_config") if isinstance(nested, dict) else None
    return config.get("quantization_config") or inner


def declared_format(config: HFConfig) -> Format | None:
    """Return the format that config.json declares; None if it is none that is read."""
    found = (format.of(quantization_settings(config)) for format in FORMATS)
    return next((format for format in found if format), None)


def without_quantization(config: HFConfig) -> HFConfig:
    """Return the config of the dequantized model."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if len(plain) < len(config) and not (plain.get("dtype") or plain.get("torch_dtype")):
        plain["torch_dtype"] = "bfloat16"  # which the quantization implied
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain


def _groups(settings: Any, format: str) -> list[dict[str, Any]]:
    """Return what compressed-tensors' groups say of weights; nothing for another format, or with another one."""
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return []
    groups = settings.get("config_groups")
    if settings.get("format") != format or not isinstance(groups, dict):
        return []
    if not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in groups.values()):
        return []
    if any(group.get("format") not in (None, format) for group in groups.values()):
        return []
    return [group["weights"] for group in groups.values()]
