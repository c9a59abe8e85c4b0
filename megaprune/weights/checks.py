"""Checks of a source before it is used."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from megaprune.models.shapes import hf_shapes
from megaprune.models.tables import EMBEDDING, OUTPUT
from megaprune.utils.errors import MegapruneError
from megaprune.weights.dtypes import FP8, WEIGHT_DTYPES
from megaprune.weights.fp8 import BLOCK
from megaprune.weights.quantization import declared_quantization, quantized_tensor

if TYPE_CHECKING:
    from megaprune.weights.tensor_source import TensorSource


def check_source(source: TensorSource) -> None:
    """Check that a source contains exactly the tensors of its family, with the shapes that the config implies and with
    supported dtypes.

    Raises:
        MegapruneError: a tensor is missing, unknown, or has another shape or dtype, or the model is quantized.
    """
    declared = declared_quantization(source.folder, source.config)
    if declared:
        raise MegapruneError(f"{source.folder} is quantized: {declared}; give the model before its quantization")
    _check_stacks(source)
    expected = {name for rule in source.family.rules(source.config) for name in rule.hf}
    _check_names(source, expected)
    _check_dtypes(source)
    _check_shapes(source, expected)
    _check_scales(source)


def _check_names(source: TensorSource, expected: set[str]) -> None:
    """Check that the source contains every name of the family's tables, and no other name."""
    held = set(source.all_names)
    missing = sorted({source.layout.name_of_missing(name) for name in expected - held})
    unknown = sorted({source.shown(name) for name in _unknown(source, expected)})
    quantized = quantized_tensor(unknown)
    if quantized:
        raise MegapruneError(
            f"{source.folder} is quantized: it holds {quantized[0]}, as {quantized[1]} stores it; give the model "
            "before its quantization"
        )
    if missing:
        raise MegapruneError(f"{source.folder} {_lack(source, missing, unknown)}")
    if unknown:
        raise MegapruneError(
            f"{source.folder} holds {unknown[0]}{_and_more(unknown)}, which the {source.family.model_type} family "
            "does not know: it would be lost on export"
        )


def _unknown(source: TensorSource, expected: set[str]) -> Iterable[str]:
    tied = {OUTPUT} if source.family.ties(source.config) else set()
    for name in set(source.names) - expected - tied:
        ignored = any(re.search(pattern, name) for pattern in source.family.ignored)
        if not (ignored or source.belongs_to_mtp(name) or source.family.passes(name)):
            yield name


def _lack(source: TensorSource, missing: Sequence[str], unknown: Sequence[str]) -> str:
    """Return the message about missing tensors, depending on the tensors that the folder contains."""
    if any(".lora_A." in name for name in unknown):
        return "is a LoRA adapter: merge it into its base model first"
    if missing == [source.shown(OUTPUT)]:
        untied = "config.json does not tie the embeddings (tie_word_embeddings)"
        what = "holds a base model, without an output layer" if source.layout.bare else "lacks lm_head.weight"
        return f"{what}, and {untied}: the checkpoint is incomplete, or not of a language model"
    if source.shown(EMBEDDING) in missing and unknown:
        return (
            f"holds {unknown[0]}{_and_more(unknown)}, where the {source.family.model_type} family names its tensors "
            f"differently ({missing[0]}{_and_more(missing)}): give a model as transformers saves it"
        )
    held = f", and holds {unknown[0]}{_and_more(unknown)}, which are not tensors of its family" if unknown else ""
    return f"lacks {missing[0]}{_and_more(missing)}{held}: the checkpoint is incomplete"


def _check_dtypes(source: TensorSource) -> None:
    for name in source.all_names:
        dtype, suffix = source.stored_dtype_name(name), _companion(source, name)
        read = source.format.companions[suffix] if suffix else WEIGHT_DTYPES
        if dtype in read:
            continue
        shown = f"{source.file(name)}: {source.place(name).stored} is stored as {dtype}"
        if suffix or not source.is_quantized(name):
            more = "" if suffix else f" and {source.format.dtype if source.format.main else 'FP8'}"
            raise MegapruneError(f"{shown}, which megaprune does not read, only {', '.join(read)}{more}")
        if len(source.shape(name)) != 2:
            raise MegapruneError(f"{shown}, but is not a matrix: only matrices are read so")
        for suffix in source.format.companions:
            if name + suffix not in source:
                raise MegapruneError(
                    f"{shown}, and {source.folder} lacks {source.shown(name + suffix)}, which {source.format.name} "
                    "needs: the checkpoint is incomplete, or quantized in a way that is not read"
                )


def _companion(source: TensorSource, name: str) -> str | None:
    """Return the suffix by which a tensor is a companion of a quantized weight; None if it is not one."""
    return next((suffix for suffix in source.format.companions if name.endswith(suffix)), None)


def _check_stacks(source: TensorSource) -> None:
    """Check that stacks of experts have the shape that the config implies, so that experts can be sliced."""
    arch = source.family.architecture(source.config)
    for stack in sorted(source.layout.stacks):
        members = source.layout.members(stack, 0)
        if not arch.num_experts:
            raise MegapruneError(f"{source.folder} holds {stack}, but config.json has no experts")
        if source.place(members[0]).parts is None:  # a checkpoint's, which will be stacked on export
            continue
        shapes = list(hf_shapes(members, arch).values())
        expected = (arch.num_experts, sum(shape[0] for shape in shapes), *shapes[0][1:])
        found = source.stored_shape(members[0])
        if source.layout.whole_experts:  # a quantized one has another shape
            found = (found[0], *source.shape(members[0]))
        if found != expected:
            raise _other_shape(source, source.shown(members[0]), found, expected)
        if source.is_quantized(members[0]) and len(members) == 2 and shapes[0][0] % BLOCK:
            raise MegapruneError(
                f"{source.file(members[0])}: {source.shown(members[0])} is FP8 in blocks that reach over gate and up, "
                f"because {shapes[0][0]} rows are not a multiple of {BLOCK}: give the model before its quantization"
            )


def _check_shapes(source: TensorSource, names: Iterable[str]) -> None:
    for name, expected in sorted(hf_shapes(names, source.family.architecture(source.config)).items()):
        if source.shape(name) != expected:
            raise _other_shape(source, source.shown(name), source.shape(name), expected)


def _other_shape(source: TensorSource, name: str, found: Sequence[int], expected: Sequence[int]) -> MegapruneError:
    return MegapruneError(
        f"{source.folder}: {name} is stored as {list(found)}, but config.json gives {list(expected)}: the "
        "weights and the config belong to different models"
    )


def _check_scales(source: TensorSource) -> None:
    for name in source.all_names:
        suffix = _companion(source, name)
        if suffix is None:
            continue
        weight = name.removesuffix(suffix)
        if weight not in source or not source.is_quantized(weight):
            kind = "FP8" if source.format.dtype == FP8 else source.format.name
            raise MegapruneError(f"{source.folder} holds {source.shown(name)}, but no {kind} weight that it scales")
        found = source.shape(name)
        expected = source.format.companion_shape(suffix, source.shape(weight))
        if found != expected:
            raise MegapruneError(
                f"{source.folder}: {source.shown(name)} is stored as {list(found)}, where the weight's "
                f"blocks are {list(expected)}"
            )


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
