"""The source of a model's HF tensors: one interface to HF folders and Megatron-Core checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megaprune.models import Family, HFConfig
from megaprune.models.names import hf_layer, hf_name, renumbered
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.utils.errors import MegapruneError
from megaprune.weights.dtypes import FP8, TORCH_NAMES
from megaprune.weights.fp8 import SCALE_SUFFIX, dequantize
from megaprune.weights.stored_layout import PLAIN, Place, StoredLayout

if TYPE_CHECKING:
    import torch

    from megaprune.weights.byte_ranges import Range


class TensorSource(Protocol):
    """The weights and the config of a model, read tensor by tensor and slice by slice.

    Tensors go by their names in the families' tables, however they are stored. An implementation gives the tensors'
    names, shapes, dtypes and numbers; what follows from names and config stands here.

    Attributes:
        folder: holds config.json, tokenizer and the like.
        config: config.json, with ``tie_word_embeddings`` as the stored tensors have it.
        stored_config: config.json as it is.
        layout: how an HF folder of the model names and stacks the tensors.
    """

    folder: Path
    config: HFConfig
    stored_config: HFConfig
    family: Family
    layout: StoredLayout = PLAIN

    @property
    def all_names(self) -> Collection[str]:
        """Every tensor's name, in order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape; of a part of a stack, its own."""
        ...

    def stored_dtype_name(self, name: str) -> str:
        """The stored dtype as safetensors names it."""
        ...

    def file(self, name: str) -> Path:
        """The file or folder that a tensor is stored in.

        Raises:
            MegapruneError: the tensor is missing.
        """
        ...

    def ranges(self, name: str) -> list[Range] | None:
        """The byte ranges of a tensor as it is stored, one behind the other; None where they lie in several chunks."""
        ...

    def _read_stored(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its slice, in the stored dtype."""
        ...

    def _begin(self, folder: Path, config: HFConfig, family: Family) -> None:
        self.folder, self.family = folder, family
        self.config = self.stored_config = config

    def _untie(self) -> None:
        self.config = self.config | {"tie_word_embeddings": False}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The tensor, or its slice ``[start:stop]`` along ``dim`` (0 or 1). Only those bytes are read."""
        tensor = self._read_stored(name, dim, start, stop)
        if not self.is_fp8(name):
            return tensor
        scale = self._read_stored(name + SCALE_SUFFIX)
        return dequantize(tensor, scale, start if dim == 0 else 0, start if dim == 1 else 0)

    @property
    def names(self) -> list[str]:
        """Every tensor's name, without the scales of quantized ones."""
        return [name for name in self.all_names if not name.endswith(SCALE_SUFFIX)]

    def __contains__(self, name: str) -> bool:
        return name in self.all_names

    def shown(self, name: str) -> str:
        """A tensor as the HF folder names it, for messages."""
        return self.layout.stored_name(name)

    def place(self, name: str) -> Place:
        """A tensor's place among the stored tensors."""
        return Place(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the stored tensor that a tensor is, or is a part of."""
        return self.shape(name)

    def is_fp8(self, name: str) -> bool:
        """Return whether a tensor is stored in FP8."""
        return self.stored_dtype_name(name) == FP8

    def dtype_name(self, name: str) -> str:
        """The dtype that reading gives, as safetensors names it; bf16 for block-FP8 weights, which are dequantized."""
        if self.is_fp8(name):
            return "BF16"
        stored = self.stored_dtype_name(name)
        if stored not in TORCH_NAMES:
            raise MegapruneError(
                f"{self.file(name)}: {self.shown(name)} is stored as {stored}, which megaprune does not read"
            )
        return stored

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that reading gives."""
        import torch

        return getattr(torch, TORCH_NAMES[self.dtype_name(name)])

    def check_tensors(self) -> None:
        """Check that each tensor of the family is there, in the shape that the config gives it and in a dtype that is
        read, and nothing that is not understood.

        Raises:
            MegapruneError: a tensor is missing, has another shape or dtype or is unknown, or the model is quantized.
        """
        from megaprune.weights.checks import check_source

        check_source(self)

    @cached_property
    def num_layers(self) -> int:
        return self.family.architecture(self.config).num_layers

    @cached_property
    def mtp_layers(self) -> list[int]:
        """The multi-token-prediction layers that are stored behind the model's own, by their index in the names."""
        layers = {hf_layer(name) for name in self.all_names}
        return sorted(layer for layer in layers if layer is not None and layer >= self.num_layers)

    def belongs_to_mtp(self, name: str) -> bool:
        """Return whether a tensor is a multi-token-prediction layer's."""
        layer = hf_layer(name)
        return bool(self.family.mtp_keys) and layer is not None and layer >= self.num_layers

    def mtp_copies(self, name: str) -> list[str]:
        """The MTP layers' own copies of the embedding or the output layer."""
        suffix = {EMBEDDING: "embed_tokens.weight", OUTPUT: "shared_head.head.weight"}.get(name)
        copies = [hf_name(layer, suffix) for layer in self.mtp_layers] if suffix else []
        return [copy for copy in copies if copy in self]

    def copies(self, name: str, keep_mtp: bool = True) -> list[str]:
        """Other tensors that are stored copies of the embedding or the output layer: the MTP layers', and of a tied
        embedding the output layer."""
        ties = name == EMBEDDING and self.config.get("tie_word_embeddings")
        found = [OUTPUT] if ties and OUTPUT in self else []
        for original in ((name, OUTPUT) if ties else (name,)) if keep_mtp else ():
            found += self.mtp_copies(original)
        return found

    def mtp_own(self) -> list[str]:
        """The MTP layers' tensors that are no copies."""
        copies = {*self.mtp_copies(EMBEDDING), *self.mtp_copies(OUTPUT)}
        return [name for name in self.names if self.belongs_to_mtp(name) and name not in copies]

    def renamed(self, name: str, kept_layers: Sequence[int], keep_mtp: bool = True) -> str | None:
        """The name of a tensor after pruning; None where it is gone. MTP layers move up behind the kept ones."""
        behind = [layer for layer in self.mtp_layers if keep_mtp]
        return renumbered(name, [*kept_layers, *behind])

    def pruned_layout(self, kept_layers: Sequence[int], keep_mtp: bool = True) -> StoredLayout:
        """The layout of the pruned model, which is stored as the source is."""
        return self.layout.renamed(lambda name: self.renamed(name, kept_layers, keep_mtp))
