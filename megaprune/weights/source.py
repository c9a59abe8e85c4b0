"""An HF model folder, read tensor by tensor and slice by slice from mapped safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megaprune.errors import MegapruneError
from megaprune.models import Family, HFConfig, family_of
from megaprune.models.shapes import hf_shapes
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.weights.dtypes import TORCH_NAMES
from megaprune.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantise, scale_shape
from megaprune.weights.hub import check_links

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")


class HFSource:
    """The weights and the config of an HF folder. Opening it reads headers only, and does not load torch.

    Raises:
        MegapruneError: no config, no safetensors, a shard that is missing or truncated, or an index that lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self._begin(Path(folder))
        self._files = _tensor_files(self.folder)
        self._headers: dict[Path, Any] = {}
        self._handles: dict[Path, Any] = {}
        self._stored: dict[Path, set[str]] = {}
        for path in sorted(set(self._files.values())):
            self._open(path)
        for name, path in self._files.items():
            if name not in self._stored[path]:
                raise MegapruneError(f"{self.folder / INDEX} places {name} in {path.name}, which does not hold it")

    def _begin(self, folder: Path) -> None:
        self.folder = folder
        check_links(folder)
        self.config = read_hf_config(folder)
        self.family: Family = family_of(self.config)

    @property
    def names(self) -> list[str]:
        """Every stored tensor's name, without the scales of quantised ones."""
        return [name for name in self._files if not name.endswith(SCALE_SUFFIX)]

    @property
    def stored_names(self) -> list[str]:
        """Every stored tensor's name, scales too."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self._described(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; bf16 for block-FP8 weights, which are dequantised as they are read."""
        import torch

        return getattr(torch, TORCH_NAMES[self.dtype_name(name)])

    def dtype_name(self, name: str) -> str:
        """The same as safetensors names it."""
        if self._is_fp8(name):
            return "BF16"
        stored = self.stored_dtype_name(name)
        if stored not in TORCH_NAMES:
            raise MegapruneError(f"{self.folder}: {name} is stored as {stored}, which megaprune does not read")
        return stored

    def stored_dtype_name(self, name: str) -> str:
        """The stored dtype as safetensors names it, of FP8 weights too."""
        return self._described(name).get_dtype()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its slice ``[start:stop]`` along ``dim`` (0 or 1). Only those bytes are read."""
        if stop is None and start == 0:
            tensor = self._handle(name).get_tensor(name)
        else:
            stored = self._handle(name).get_slice(name)
            tensor = stored[start:stop] if dim == 0 else stored[:, start:stop]
        if not self._is_fp8(name):
            return tensor
        scale = self._handle(name + SCALE_SUFFIX).get_tensor(name + SCALE_SUFFIX)
        return dequantise(tensor, scale, start if dim == 0 else 0, start if dim == 1 else 0)

    @cached_property
    def mtp_layers(self) -> list[int]:
        """The multi-token-prediction layers that are stored behind the model's own, by their index in the names."""
        matches = (_LAYER.match(name) for name in self._files)
        return sorted({int(match[2]) for match in matches if match and int(match[2]) >= self.num_layers})

    def mtp_copies(self, name: str) -> list[str]:
        """The MTP layers' own copies of the embedding or the output layer."""
        suffix = {EMBEDDING: "embed_tokens.weight", OUTPUT: "shared_head.head.weight"}.get(name)
        copies = [f"model.layers.{layer}.{suffix}" for layer in self.mtp_layers]
        return [copy for copy in copies if copy in self._files]

    def mtp_own(self) -> list[str]:
        """The MTP layers' tensors that are no copies."""
        copies = {*self.mtp_copies(EMBEDDING), *self.mtp_copies(OUTPUT)}
        return [name for name in self.names if self._belongs_to_mtp(name) and name not in copies]

    @cached_property
    def num_layers(self) -> int:
        return self.family.architecture(self.config).num_layers

    def renamed(self, name: str, kept_layers: Sequence[int], keep_mtp: bool = True) -> str | None:
        """The name of a tensor after pruning; None where it is gone. MTP layers move up behind the kept ones."""
        behind = [layer for layer in self.mtp_layers if keep_mtp]
        return renamed(name, [*kept_layers, *behind])

    def check_tensors(self) -> None:
        """Checks that the folder holds each tensor of its family, in the shape that the config gives it, and nothing
        that is not understood.

        Raises:
            MegapruneError: a tensor is missing, has another shape or is unknown.
        """
        self._check_quantisation()
        names = {name for rule in self.family.rules(self.config) for name in rule.hf}
        missing = sorted(names - set(self._files)) or self._missing_scales()
        if missing:
            raise MegapruneError(f"{self.folder} lacks {missing[0]}{_and_more(missing)}: the checkpoint is incomplete")
        self._check_shapes(names)
        self._check_scales()
        tied = {OUTPUT} if self.config.get("tie_word_embeddings") else set()
        unknown = [
            name
            for name in sorted(set(self.names) - names - tied)
            if not self._belongs_to_mtp(name) and not any(re.search(pattern, name) for pattern in self.family.ignored)
        ]
        if unknown:
            raise MegapruneError(
                f"{self.folder} holds {unknown[0]}{_and_more(unknown)}, which the {self.family.model_type} family "
                "does not know: it would be lost on export"
            )

    def _check_quantisation(self) -> None:
        quantisation = self.config.get("quantization_config")
        if not quantisation:
            return
        method, block = quantisation.get("quant_method"), quantisation.get("weight_block_size")
        if method != "fp8" or block != [BLOCK, BLOCK]:
            raise MegapruneError(
                f"{self.folder} is quantised ({method}, blocks {block}): only FP8 in blocks of [{BLOCK}, {BLOCK}] is "
                "read; give the model before its quantisation"
            )

    def _check_shapes(self, names: Iterable[str]) -> None:
        for name, expected in sorted(hf_shapes(names, self.family.architecture(self.config)).items()):
            if self.shape(name) != expected:
                raise MegapruneError(
                    f"{self.folder}: {name} is stored as {list(self.shape(name))}, where config.json makes it "
                    f"{list(expected)}: the weights and the config are of different models"
                )

    def _check_scales(self) -> None:
        for scale in (name for name in self._files if name.endswith(SCALE_SUFFIX)):
            weight = scale.removesuffix(SCALE_SUFFIX)
            if weight not in self._files or not self._is_fp8(weight):
                raise MegapruneError(f"{self.folder} holds {scale}, but no FP8 weight that it scales")
            expected = scale_shape(self.shape(weight))
            if self.shape(scale) != expected:
                raise MegapruneError(
                    f"{self.folder}: {scale} is stored as {list(self.shape(scale))}, where the weight's blocks are "
                    f"{list(expected)}"
                )

    def _is_fp8(self, name: str) -> bool:
        return self.stored_dtype_name(name) == "F8_E4M3"

    def _missing_scales(self) -> list[str]:
        return sorted(
            name + SCALE_SUFFIX for name in self.names if self._is_fp8(name) and name + SCALE_SUFFIX not in self._files
        )

    def _belongs_to_mtp(self, name: str) -> bool:
        match = _LAYER.match(name)
        return bool(match and self.family.mtp_keys and int(match[2]) >= self.num_layers)

    def file(self, name: str) -> Path:
        """The file that a tensor is stored in."""
        if name not in self._files:
            raise MegapruneError(f"{self.folder} lacks the tensor {name}: the checkpoint is incomplete")
        return self._files[name]

    def _described(self, name: str) -> Any:
        return self._headers[self.file(name)].get_slice(name)

    def _handle(self, name: str) -> Any:
        path = self.file(name)
        if path not in self._handles:
            self._handles[path] = _open_safetensors(path, "pt")
        return self._handles[path]

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise MegapruneError(f"{path} is missing, though {INDEX} names it: fetch the model again")
        self._headers[path] = _open_safetensors(path)
        self._stored[path] = set(self._headers[path].keys())


def renamed(name: str, kept_layers: Sequence[int]) -> str | None:
    """The name of an HF tensor after pruning; None where its layer is gone."""
    match = _LAYER.match(name)
    if not match:
        return name
    layer = int(match.group(2))
    if layer not in kept_layers:
        return None
    return f"{match.group(1)}{list(kept_layers).index(layer)}{match.group(3)}"


def read_hf_config(folder: Path) -> HFConfig:
    """Reads config.json as it is stored.

    Raises:
        MegapruneError: the folder or the file is missing or is not JSON.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise MegapruneError(
            f"{folder} does not exist or is not a folder: --hf-model takes an HF model folder or hub id"
        )
    if not path.is_file():
        raise MegapruneError(f"{folder} holds no config.json: is it an HF model folder?")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise MegapruneError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise MegapruneError(f"{path} is not a JSON object")
    return config


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file, from the one file there is or from the index; where there are both, transformers too reads
    the one file."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return dict.fromkeys(_open_safetensors(single).keys(), single)
    if not index.is_file():
        pickled = any(path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}"))
        hint = ", only pickled weights: convert them to safetensors first" if pickled else ""
        raise MegapruneError(f"{folder} holds neither model.safetensors nor {INDEX}{hint}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MegapruneError(f"{index} is not a safetensors index: fetch it again") from None


def _open_safetensors(path: Path, framework: str = "np") -> Any:
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise MegapruneError(f"{path} is damaged or truncated ({error}): fetch it again") from None


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
