"""An HF model folder, read tensor by tensor and slice by slice from mapped safetensors files."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megaprune.errors import MegapruneError
from megaprune.models import Family, HFConfig, family_of
from megaprune.models.shapes import hf_shapes
from megaprune.models.tables import EMBEDDING, OUTPUT

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
}
INDEX = "model.safetensors.index.json"
_LAYER = re.compile(r"^(model\.layers\.)(\d+)(\..+)$")


class HFSource:
    """The weights and the config of an HF folder. Opening it reads headers only.

    Raises:
        MegapruneError: no config, no safetensors, a shard that is missing or truncated, or an index that lies.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = read_hf_config(self.folder)
        self.family: Family = family_of(self.config)
        self._files = _tensor_files(self.folder)
        self._handles: dict[Path, Any] = {}
        self._stored: dict[Path, set[str]] = {}
        for path in sorted(set(self._files.values())):
            self._open(path)
        for name, path in self._files.items():
            if name not in self._stored[path]:
                raise MegapruneError(f"{self.folder / INDEX} places {name} in {path.name}, which does not hold it")

    @property
    def names(self) -> list[str]:
        """Every stored tensor's name."""
        return list(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise MegapruneError(f"{self.folder}: {name} is stored as {stored}, which megaprune does not read")
        return _DTYPES[stored]

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its slice ``[start:stop]`` along ``dim`` (0 or 1). Only those bytes are read."""
        if stop is None and start == 0:
            return self._handles[self._file(name)].get_tensor(name)
        stored = self._slice(name)
        return stored[start:stop] if dim == 0 else stored[:, start:stop]

    def num_parameters(self, kept_layers: Sequence[int] | None = None) -> int:
        """Parameters of the model, or of the model of these layers; tied weights count once."""
        rules = [rule for rule in self.family.rules(self.config) if rule.export]
        names = [name for rule in rules for name in rule.hf]
        return sum(math.prod(self.shape(n)) for n in names if kept_layers is None or renamed(n, kept_layers))

    def layer_costs(self) -> list[int]:
        """Multiply-adds that each layer's weights do for a token."""
        everything, layers = self.num_parameters([]), range(self.family.architecture(self.config).num_layers)
        return [self.num_parameters([layer]) - everything for layer in layers]

    def output_cost(self) -> int:
        """Multiply-adds that the output layer does for a token."""
        return math.prod(self.shape(EMBEDDING))

    def check_tensors(self) -> None:
        """Checks that the folder holds each tensor of its family, in the shape that the config gives it, and nothing
        that is not understood.

        Raises:
            MegapruneError: a tensor is missing, has another shape or is unknown.
        """
        names = {name for rule in self.family.rules(self.config) for name in rule.hf}
        missing = sorted(names - set(self._files))
        if missing:
            raise MegapruneError(f"{self.folder} lacks {missing[0]}{_and_more(missing)}: the checkpoint is incomplete")
        self._check_shapes(names)
        tied = {OUTPUT} if self.config.get("tie_word_embeddings") else set()
        unknown = [
            name
            for name in sorted(set(self._files) - names - tied)
            if not any(re.search(pattern, name) for pattern in self.family.ignored)
        ]
        if unknown:
            raise MegapruneError(
                f"{self.folder} holds {unknown[0]}{_and_more(unknown)}, which the {self.family.model_type} family "
                "does not know: it would be lost on export"
            )

    def _check_shapes(self, names: Iterable[str]) -> None:
        for name, expected in sorted(hf_shapes(names, self.family.architecture(self.config)).items()):
            if self.shape(name) != expected:
                raise MegapruneError(
                    f"{self.folder}: {name} is stored as {list(self.shape(name))}, where config.json makes it "
                    f"{list(expected)}: the weights and the config are of different models"
                )

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise MegapruneError(f"{self.folder} lacks the tensor {name}: the checkpoint is incomplete")
        return self._files[name]

    def _slice(self, name: str) -> Any:
        return self._handles[self._file(name)].get_slice(name)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise MegapruneError(f"{path} is missing, though {INDEX} names it: fetch the model again")
        self._handles[path] = _open_safetensors(path)
        self._stored[path] = set(self._handles[path].keys())


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


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MegapruneError(f"{path} is damaged or truncated ({error}): fetch it again") from None


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
