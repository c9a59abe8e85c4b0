"""An HF model folder, read tensor by tensor and slice by slice from mapped safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megaprune.models import Family, HFConfig, family_of
from megaprune.models.names import hf_layer, hf_name, renumbered
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.utils.errors import MegapruneError
from megaprune.weights.dtypes import FP8, TORCH_NAMES
from megaprune.weights.fp8 import SCALE_SUFFIX, dequantise
from megaprune.weights.hub import check_links
from megaprune.weights.stored_layout import PLAIN, Place, StoredLayout
from megaprune.weights.tied import same_tensor

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"


class HFSource:
    """The weights and the config of an HF folder. Opening it reads headers only, and does not load torch.

    Tensors go by their names in the families' tables, however the folder stores them. Embeddings that config.json ties,
    but that are stored with another output layer, are not tied: transformers computes with both. ``config`` says so;
    ``stored_config`` is the file's.

    Raises:
        MegapruneError: no config, no safetensors, a shard that is missing or truncated, or an index that lies.
    """

    layout: StoredLayout = PLAIN
    # of those tensors that are not stored under their own names
    _places: Mapping[str, Place] = {}

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
        self.stored_files = dict(self._files)
        self._arrange()
        outputs = [name for name in (EMBEDDING, OUTPUT) if name in self._files]
        places = [(self.file(name), self.place(name).stored) for name in outputs]
        if self.config.get("tie_word_embeddings") and len(places) == 2 and not same_tensor(*places):
            self._untie()

    def _begin(self, folder: Path) -> None:
        self.folder = folder
        check_links(folder)
        self.config = self.stored_config = read_hf_config(folder)
        self.family: Family = family_of(self.config)

    def _untie(self) -> None:
        self.config = self.config | {"tie_word_embeddings": False}

    def _arrange(self) -> None:
        """Names the stored tensors as the families' tables do."""
        self.layout = StoredLayout.of(self.stored_files, bool(self.config.get("tie_word_embeddings")))
        if self.layout == PLAIN:
            return
        self._files, self._places = {}, {}
        for stored, path in self.stored_files.items():
            shape = self._headers[path].get_slice(stored).get_shape()
            places = self.layout.places(stored, shape[0] if shape else 0)
            twice = next((name for name in places if name in self._files), None)
            if twice:
                raise MegapruneError(f"{self.folder} holds both {stored} and {self.place(twice).stored}, which are one")
            self._files |= dict.fromkeys(places, path)
            self._places |= places

    @property
    def names(self) -> list[str]:
        """Every stored tensor's name, without the scales of quantised ones."""
        return [name for name in self._files if not name.endswith(SCALE_SUFFIX)]

    @property
    def all_names(self) -> list[str]:
        """The same, with the scales."""
        return list(self._files)

    def place(self, name: str) -> Place:
        """Where a tensor lies in what is stored."""
        return self._places.get(name) or Place(name)

    def shown(self, name: str) -> str:
        """A tensor as the folder names it, for messages."""
        return self.layout.stored_name(name)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, in a stack its own."""
        shape, place = self.stored_shape(name), self.place(name)
        return shape if place.parts is None else (place.at(shape)[2], *shape[2:])

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of what a tensor is stored in."""
        return tuple(self._described(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype; bf16 for block-FP8 weights, which are dequantised as they are read."""
        import torch

        return getattr(torch, TORCH_NAMES[self.dtype_name(name)])

    def dtype_name(self, name: str) -> str:
        """The same as safetensors names it."""
        if self.is_fp8(name):
            return "BF16"
        stored = self.stored_dtype_name(name)
        if stored not in TORCH_NAMES:
            raise MegapruneError(
                f"{self.file(name)}: {self.shown(name)} is stored as {stored}, which megaprune does not read"
            )
        return stored

    def stored_dtype_name(self, name: str) -> str:
        """The stored dtype as safetensors names it, of FP8 weights too."""
        return self._described(name).get_dtype()

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its slice ``[start:stop]`` along ``dim`` (0 or 1). Only those bytes are read."""
        tensor = self._read_stored(name, dim, start, stop)
        if not self.is_fp8(name):
            return tensor
        scale = self._read_stored(name + SCALE_SUFFIX)
        return dequantise(tensor, scale, start if dim == 0 else 0, start if dim == 1 else 0)

    def _read_stored(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        place = self.place(name)
        if place.parts is None and stop is None and start == 0:
            return self._handle(name).get_tensor(place.stored)
        stored = self._handle(name).get_slice(place.stored)
        if place.parts is None:
            return stored[start:stop] if dim == 0 else stored[:, start:stop]
        expert, first, rows = place.at(stored.get_shape())
        if dim == 0:
            stop = rows if stop is None else stop
            return stored[expert : expert + 1, first + start : first + stop].squeeze(0)
        return stored[expert : expert + 1, first : first + rows, start:stop].squeeze(0)

    @cached_property
    def mtp_layers(self) -> list[int]:
        """The multi-token-prediction layers that are stored behind the model's own, by their index in the names."""
        layers = {hf_layer(name) for name in self._files}
        return sorted(layer for layer in layers if layer is not None and layer >= self.num_layers)

    def mtp_copies(self, name: str) -> list[str]:
        """The MTP layers' own copies of the embedding or the output layer."""
        suffix = {EMBEDDING: "embed_tokens.weight", OUTPUT: "shared_head.head.weight"}.get(name)
        copies = [hf_name(layer, suffix) for layer in self.mtp_layers] if suffix else []
        return [copy for copy in copies if copy in self._files]

    def copies(self, name: str, keep_mtp: bool = True) -> list[str]:
        """Other tensors that are stored copies of the embedding or the output layer: the MTP layers', and of a tied
        embedding the output layer."""
        ties = name == EMBEDDING and self.config.get("tie_word_embeddings")
        found = [OUTPUT] if ties and OUTPUT in self._files else []
        for original in ((name, OUTPUT) if ties else (name,)) if keep_mtp else ():
            found += self.mtp_copies(original)
        return found

    def mtp_own(self) -> list[str]:
        """The MTP layers' tensors that are no copies."""
        copies = {*self.mtp_copies(EMBEDDING), *self.mtp_copies(OUTPUT)}
        return [name for name in self.names if self.belongs_to_mtp(name) and name not in copies]

    @cached_property
    def num_layers(self) -> int:
        return self.family.architecture(self.config).num_layers

    def renamed(self, name: str, kept_layers: Sequence[int], keep_mtp: bool = True) -> str | None:
        """The name of a tensor after pruning; None where it is gone. MTP layers move up behind the kept ones."""
        behind = [layer for layer in self.mtp_layers if keep_mtp]
        return renumbered(name, [*kept_layers, *behind])

    def pruned_layout(self, kept_layers: Sequence[int], keep_mtp: bool = True) -> StoredLayout:
        """How a pruned model is stored: as the source is."""
        return self.layout.renamed(lambda name: self.renamed(name, kept_layers, keep_mtp))

    def check_tensors(self) -> None:
        """Checks that the folder holds each tensor of its family, in the shape that the config gives it and in a dtype
        that is read, and nothing that is not understood.

        Raises:
            MegapruneError: a tensor is missing, has another shape or dtype or is unknown, or the model is quantised.
        """
        from megaprune.weights.checks import check_source

        check_source(self)

    def is_fp8(self, name: str) -> bool:
        """Whether a tensor is stored in FP8."""
        return self.stored_dtype_name(name) == FP8

    def belongs_to_mtp(self, name: str) -> bool:
        """Whether a tensor is a multi-token-prediction layer's."""
        layer = hf_layer(name)
        return bool(self.family.mtp_keys) and layer is not None and layer >= self.num_layers

    def file(self, name: str) -> Path:
        """The file that a tensor is stored in."""
        if name not in self._files:
            raise MegapruneError(f"{self.folder} lacks the tensor {self.shown(name)}: the checkpoint is incomplete")
        return self._files[name]

    def _described(self, name: str) -> Any:
        return self._headers[self.file(name)].get_slice(self.place(name).stored)

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


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds the files of its weights, and not config.json alone."""
    try:
        return all(path.is_file() for path in _tensor_files(folder).values())
    except MegapruneError:
        return False


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name to file, from the one file there is or from the index; where there are both, transformers too reads
    the one file."""
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return dict.fromkeys(_open_safetensors(single).keys(), single)
    if not index.is_file():
        raise MegapruneError(f"{folder} holds neither model.safetensors nor {INDEX}{_other_weights(folder)}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MegapruneError(f"{index} is not a safetensors index: fetch it again") from None


def _other_weights(folder: Path) -> str:
    """What a folder without weights that are read holds instead, as the end of a sentence."""
    if (folder / "adapter_model.safetensors").is_file():
        return ", only a LoRA adapter: merge it into its base model first"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f", only {others[0]}: give the model as transformers saves it, with the index of its files"
    if any(path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")):
        return ", only pickled weights: convert them to safetensors first"
    return ", only GGUF: give the model before its conversion" if any(folder.glob("*.gguf")) else ""


def _open_safetensors(path: Path, framework: str = "np") -> Any:
    try:
        return safe_open(path, framework=framework)
    except (SafetensorError, OSError) as error:
        raise MegapruneError(f"{path} is damaged or truncated ({error}): fetch it again") from None
