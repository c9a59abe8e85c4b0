"""An HF model folder, read tensor by tensor and slice by slice from its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from megaprune.models import HFConfig, family_of
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.utils.errors import MegapruneError
from megaprune.weights.byte_ranges import Buffer, Range, first_difference
from megaprune.weights.hub import check_links
from megaprune.weights.reader import INDEX, TensorFiles
from megaprune.weights.stored_layout import PLAIN, Place, StoredLayout
from megaprune.weights.tensor_source import TensorSource

if TYPE_CHECKING:
    import torch


class HFSource(TensorSource):
    """Weights and config of an HF folder. Opening it reads only headers and does not import torch.

    Embeddings that config.json ties are not tied if a different output layer is stored: transformers uses both tensors.
    ``config`` contains the corrected setting.

    Raises:
        MegapruneError: there is no config or no safetensors file, a shard is missing or truncated, or the index is
        wrong.
    """

    # only of tensors that are stored under other names
    _places: Mapping[str, Place] = {}

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        check_links(folder)
        config = read_hf_config(folder)
        self._begin(folder, config, family_of(config))
        self._files = _tensor_files(folder)
        self._reader = TensorFiles()
        held = {path: self._names_in(path) for path in sorted(set(self._files.values()))}
        for name, path in self._files.items():
            if name not in held[path]:
                raise MegapruneError(f"{folder / INDEX} places {name} in {path.name}, which does not contain it")
        self.stored_files = dict(self._files)
        self._arrange()
        outputs = [name for name in (EMBEDDING, OUTPUT) if name in self._files]
        if self.family.ties(config) and len(outputs) == 2 and not self._same(*outputs):
            self._untie()

    def _names_in(self, path: Path) -> set[str]:
        if not path.is_file():
            raise MegapruneError(f"{path} is missing, although {INDEX} lists it: download the model again")
        self._reader.check(path)
        return set(self._reader.names(path))

    def _arrange(self) -> None:
        """Give the stored tensors the names of the families' tables."""
        family = self.family
        self.layout = StoredLayout.of(
            self.stored_files, family.ties(self.config), family.prefix, family.stacks_whole_experts
        )
        if self.layout == PLAIN:
            self._name_packed()
            return
        self._files, self._places = {}, {}
        for stored, path in self.stored_files.items():
            _, shape = self._reader.describe(path, stored)
            places = self.layout.places(stored, shape[0] if shape else 0)
            twice = next((name for name in places if name in self._files), None)
            if twice:
                raise MegapruneError(
                    f"{self.folder} holds both {stored} and {self.place(twice).stored}, which are the same tensor"
                )
            self._files |= dict.fromkeys(places, path)
            self._places |= places
        self._name_packed()

    def _name_packed(self) -> None:
        """Give the main tensors of quantized weights the names of the weights."""
        main = self.format.main
        for stored in [stored for stored in self._files if main and stored.endswith(main)]:
            name = stored.removesuffix(main)
            if name in self._files:
                both = f"{self.place(stored).stored} and {self.place(name).stored}"
                raise MegapruneError(f"{self.folder} holds both {both}, which are the same tensor")
            self._files[name] = self._files.pop(stored)
            self._places = {**self._places, name: self.place(stored)}

    def _same(self, first: str, second: str) -> bool:
        """Return whether two tensors are equal bit for bit."""
        if self._described(first) != self._described(second):
            return False
        return first_difference(self._where(first), self._where(second)) is None

    @property
    def all_names(self) -> Collection[str]:
        """Return the names of all tensors, including scales."""
        return self._files.keys()

    def place(self, name: str) -> Place:
        """Return a tensor's place among the stored tensors."""
        return self._places.get(name) or Place(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; for a part of a stack, the shape of the part."""
        shape = self.own_shape(name)
        return self.format.shape(shape) if self.is_quantized(name) else shape

    def own_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of what is stored of a tensor."""
        shape, place = self.stored_shape(name), self.place(name)
        return shape if place.parts is None else (place.at(shape)[2], *shape[2:])

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the stored tensor that holds a tensor."""
        return self._described(name)[1]

    def stored_dtype_name(self, name: str) -> str:
        """Return the stored dtype by its safetensors name, also for quantized weights."""
        return self._described(name)[0]

    def file(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        if name not in self._files:
            raise MegapruneError(f"{self.folder} lacks the tensor {self.shown(name)}: the checkpoint is incomplete")
        return self._files[name]

    def ranges(self, name: str) -> list[Range] | None:
        """Return the range of a tensor's bytes."""
        return [self._where(name)]

    def _read_stored(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        path, place, shape = self.file(name), self.place(name), self.own_shape(name)
        if start == 0 and stop is None:
            return self._reader.read(path, place, shape, Buffer())
        return self._reader.read_slice(path, place, shape, dim, start, stop)

    def _where(self, name: str) -> Range:
        return self._reader.where(self.file(name), self.place(name))

    def _described(self, name: str) -> tuple[str, tuple[int, ...]]:
        return self._reader.describe(self.file(name), self.place(name).stored)


def read_hf_config(folder: Path) -> HFConfig:
    """Read config.json as it is stored.

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
    except ValueError as error:  # not JSON, or not UTF-8
        raise MegapruneError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise MegapruneError(f"{path} is not a JSON object")
    return config


def holds_weights(folder: Path) -> bool:
    """Return whether a folder contains weights, not only config.json."""
    try:
        return all(path.is_file() for path in _tensor_files(folder).values())
    except MegapruneError:
        return False


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of each tensor, from the single file or from the index. If both exist, the single file is used,
    as in transformers.
    """
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        files = TensorFiles()
        files.check(single)
        return dict.fromkeys(files.names(single), single)
    if not index.is_file():
        raise MegapruneError(f"{folder} holds neither model.safetensors nor {INDEX}{_other_weights(folder)}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MegapruneError(f"{index} is not a safetensors index: download it again") from None


def _other_weights(folder: Path) -> str:
    """Return the end of a message about a folder without readable weights: the unsupported weights that it contains."""
    if (folder / "adapter_model.safetensors").is_file():
        return ", only a LoRA adapter: merge it into its base model first"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f", only {others[0]}: give the model as transformers saves it, with the index of its files"
    if any(path for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")):
        return ", only pickled weights: convert them to safetensors first"
    return ", only GGUF: give the model before its conversion" if any(folder.glob("*.gguf")) else ""
