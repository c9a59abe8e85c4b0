"""Source of a model's HF tensors: one interface to HF folders and Megatron-Core checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from megaprune.models import Family, HFConfig
from megaprune.models.names import hf_layer, hf_name, renumbered
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.utils.errors import MegapruneError
from megaprune.weights.dtypes import TORCH_NAMES
from megaprune.weights.quantized import BLOCK_FP8, Format, declared_format
from megaprune.weights.stored_layout import PLAIN, Place, StoredLayout

if TYPE_CHECKING:
    import torch

    from megaprune.weights.byte_ranges import Range


class TensorSource(Protocol):
    """Weights and config of a model, read tensor by tensor and slice by slice.

    Tensors have the names of the families' tables, however they are stored. An implementation provides names, shapes,
    dtypes and values. Everything that follows from them and from the config is defined here.

    Attributes:
        folder: contains config.json, the tokenizer and similar files.
        config: config.json, with ``tie_word_embeddings`` according to the stored tensors.
        stored_config: config.json as stored.
        layout: the names and stacks of the tensors in an HF folder of the model.
    """

    folder: Path
    config: HFConfig
    stored_config: HFConfig
    family: Family
    layout: StoredLayout = PLAIN

    @property
    def all_names(self) -> Collection[str]:
        """Return the names of all tensors, in order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor; for a part of a stack, the shape of the part."""
        ...

    def stored_dtype_name(self, name: str) -> str:
        """Return the stored dtype by its safetensors name."""
        ...

    def file(self, name: str) -> Path:
        """Return the file or folder that contains a tensor.

        Raises:
            MegapruneError: the tensor is missing.
        """
        ...

    def ranges(self, name: str) -> list[Range] | None:
        """Return the byte ranges that make up a tensor, in order; None if they are scattered over several chunks."""
        ...

    def _read_stored(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the tensor, or its slice, in the stored dtype."""
        ...

    def _begin(self, folder: Path, config: HFConfig, family: Family) -> None:
        self.folder, self.family = folder, family
        self.config = self.stored_config = config

    def _untie(self) -> None:
        self.config = self.config | {"tie_word_embeddings": False}

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the tensor, or its slice ``[start:stop]`` along ``dim`` (0 or 1). Only those bytes are read."""
        if not self.is_quantized(name):
            return self._read_stored(name, dim, start, stop)

        def read(suffix: str, dim: int, start: int, stop: int | None) -> torch.Tensor:
            return self._read_stored(name + ("" if suffix == self.format.main else suffix), dim, start, stop)

        return self.format.read(read, self.shape(name), dim, start, stop)

    @cached_property
    def format(self) -> Format:
        """Return the format of the quantized weights; where none is declared, one that is recognized by its dtype."""
        return declared_format(self.config) or BLOCK_FP8

    @property
    def names(self) -> list[str]:
        """Return the names of all tensors, without the companions of quantized ones."""
        return [name for name in self.all_names if not name.endswith(tuple(self.format.companions))]

    def __contains__(self, name: str) -> bool:
        return name in self.all_names

    def shown(self, name: str) -> str:
        """Return the name of a tensor in the HF folder, for messages."""
        return self.layout.stored_name(name)

    def place(self, name: str) -> Place:
        """Return a tensor's place among the stored tensors."""
        return Place(name)

    def stored_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of the stored tensor that contains a tensor."""
        return self.shape(name)

    def is_quantized(self, name: str) -> bool:
        """Return whether a tensor is stored quantized."""
        format = self.format
        return self.stored_dtype_name(name) == format.dtype and not name.endswith(tuple(format.companions))

    def dtype_name(self, name: str) -> str:
        """Return the dtype in which `read` returns a tensor, by its safetensors name. It is bf16 for quantized weights,
        which are dequantized.
        """
        if self.is_quantized(name):
            return "BF16"
        stored = self.stored_dtype_name(name)
        if stored not in TORCH_NAMES:
            raise MegapruneError(
                f"{self.file(name)}: {self.shown(name)} is stored as {stored}, which megaprune does not read"
            )
        return stored

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which `read` returns a tensor."""
        import torch

        return getattr(torch, TORCH_NAMES[self.dtype_name(name)])

    def check_tensors(self) -> None:
        """Check that the source contains exactly the tensors of the family, with the shapes that the config implies and
        with supported dtypes.

        Raises:
            MegapruneError: a tensor is missing, unknown, or has another shape or dtype, or the model is quantized.
        """
        from megaprune.weights.checks import check_source

        check_source(self)

    @cached_property
    def num_layers(self) -> int:
        return self.family.architecture(self.config).num_layers

    @cached_property
    def mtp_layers(self) -> list[int]:
        """Return the multi-token-prediction layers, which are stored after the model's own, by their numbers in the
        names.
        """
        layers = {hf_layer(name) for name in self.all_names}
        return sorted(layer for layer in layers if layer is not None and layer >= self.num_layers)

    def belongs_to_mtp(self, name: str) -> bool:
        """Return whether a tensor belongs to a multi-token-prediction layer."""
        layer = hf_layer(name)
        return bool(self.family.mtp_keys) and layer is not None and layer >= self.num_layers

    def mtp_copies(self, name: str) -> list[str]:
        """Return the MTP layers' own copies of the embedding and the output layer."""
        suffix = {EMBEDDING: "embed_tokens.weight", OUTPUT: "shared_head.head.weight"}.get(name)
        copies = [hf_name(layer, suffix) for layer in self.mtp_layers] if suffix else []
        return [copy for copy in copies if copy in self]

    def copies(self, name: str, keep_mtp: bool = True) -> list[str]:
        """Return the other tensors that are copies of the embedding or the output layer: those of MTP layers, and the
        output layer if it is tied.
        """
        ties = name == EMBEDDING and self.family.ties(self.config)
        found = [OUTPUT] if ties and OUTPUT in self else []
        for original in ((name, OUTPUT) if ties else (name,)) if keep_mtp else ():
            found += self.mtp_copies(original)
        return found

    def carried(self, kept_layers: Sequence[int]) -> list[str]:
        """Return the tensors of kept layers, and of other parts of the model, that no Megatron parameter holds."""
        arch = self.family.architecture(self.config)
        return [name for name in self.names if self.family.passes(name)] + [
            name
            for layer in kept_layers
            for rule in self.family.layer_rules(arch, layer)
            if rule.carried
            for name in rule.at(layer).hf
        ]

    def mtp_own(self) -> list[str]:
        """Return the MTP layers' tensors that are not copies."""
        copies = {*self.mtp_copies(EMBEDDING), *self.mtp_copies(OUTPUT)}
        return [name for name in self.names if self.belongs_to_mtp(name) and name not in copies]

    def renamed(self, name: str, kept_layers: Sequence[int], keep_mtp: bool = True) -> str | None:
        """Return the name of a tensor after pruning; None if it is removed. MTP layers follow the kept layers."""
        behind = [layer for layer in self.mtp_layers if keep_mtp]
        return renumbered(name, [*kept_layers, *behind])

    def pruned_layout(self, kept_layers: Sequence[int], keep_mtp: bool = True) -> StoredLayout:
        """Return the layout of the pruned model, which is stored like the source."""
        return self.layout.renamed(lambda name: self.renamed(name, kept_layers, keep_mtp))
