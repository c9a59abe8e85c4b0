"""Conversion of a built model's weights: from HF tensors into each rank's shards, and back."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megaprune.mcore.builder import uses_transformer_engine
from megaprune.mcore.export_shares import Gathered, shares
from megaprune.mcore.parallel import (
    all_gather_objects,
    expert_tensor_parallel,
    on_rank0,
    raise_together,
    stop_if_asked,
    tensor_parallel,
    wait_for_all,
)
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.models import WeightRule
from megaprune.models.mtp import mtp_parameter_rules
from megaprune.models.names import source_name
from megaprune.models.shards import TensorParallel
from megaprune.utils import stopping
from megaprune.utils.disk import explain, one_line
from megaprune.utils.errors import MegapruneError
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import ShardWriter, finish_shards

T = TypeVar("T")


def rules_by_parameter(source: TensorSource, transformer_engine: bool = False) -> dict[str, WeightRule]:
    """Return the weight rules of the source model by the name of the Megatron parameter.

    Args:
        source: the HF checkpoint.
        transformer_engine: whether the model is built from Transformer Engine layers, whose parameter names differ.
    """
    rules: dict[str, WeightRule] = {}
    ahead = mtp_parameter_rules(source.family, source.family.architecture(source.config), len(source.mtp_layers))
    for rule in (*source.family.rules(source.config), *ahead):
        if transformer_engine:
            rule = replace(rule, megatron=rule.te or rule.megatron, shard=rule.te_shard or rule.shard)
        rules[rule.megatron] = rule
    return rules


def _tensor_parallel(rule: WeightRule) -> TensorParallel:
    """Return rank and size in the tensor-parallel group over which the rule's parameter is sharded."""
    return expert_tensor_parallel() if rule.expert else tensor_parallel()


@torch.no_grad()
def import_weights(model: PipelineModel, source: TensorSource, kept_layers: Sequence[int] | None = None) -> None:
    """Load this rank's parameters from the HF checkpoint; only its slices are read. Collective.

    Args:
        model: this rank's part of the model.
        source: the HF checkpoint.
        kept_layers: source layers that the model consists of; None means all.

    Raises:
        MegapruneError: a weight is missing, has the wrong shape, or is not finite. Raised on every rank.
        RunStopped: a rank was asked to stop. Raised on every rank.
    """
    arch = source.family.architecture(source.config)
    rules = rules_by_parameter(source, uses_transformer_engine(model))
    error = None
    try:
        for name, parameter in model.named_weights():
            if stopping.is_due("import"):
                break  # the ranks stop together below
            rule = rules[source_name(name, kept_layers)]
            shard, hf_name = rule.read(source, arch, _tensor_parallel(rule)), rule.hf[0]
            if shard.shape != parameter.shape:
                raise MegapruneError(
                    f"{source.folder}: {source.shown(hf_name)} has the wrong shape: its part for {name} is "
                    f"{tuple(shard.shape)}, but config.json gives {tuple(parameter.shape)}"
                )
            if not torch.isfinite(shard).all():
                culprit = source.shown(next(hf for hf in rule.hf if not torch.isfinite(source.read(hf)).all()))
                raise MegapruneError(f"{source.folder}: {culprit} holds values that are not finite (NaN or infinity)")
            parameter.copy_(shard)
    except MegapruneError as met:
        error = met
    raise_together(error)
    stop_if_asked("import", "while it imports weights")


@torch.no_grad()
def export_weights(
    model: PipelineModel,
    source: TensorSource,
    kept_layers: Sequence[int],
    folder: Path,
    max_shard_bytes: int,
    whole: bool = False,
    keep_mtp: bool = True,
) -> None:
    """Write the model as HF safetensors with the dtypes of the source, gathered tensor by tensor. Collective.

    A weight that is stored in fp32 and was not trained in a bf16 run keeps its exact value. Every rank writes files of
    its own (see `export_shares`), and rank 0 writes the index.

    Args:
        model: this rank's part of the model.
        source: the HF checkpoint that the model was imported from.
        kept_layers: source layers that are exported.
        folder: an existing folder on a file system that all ranks share.
        max_shard_bytes: size limit of a safetensors file.
        whole: whether the model still holds the pruned layers, too.
        keep_mtp: write MTP layers behind the kept layers: those of the model, or copies of the source's if the model
            has none. Their copies of the embedding and the output layer are written from the trained weights.

    Raises:
        MegapruneError: the folder cannot be written. Raised on every rank.
    """
    writer, layout = ShardWriter(folder, max_shard_bytes, dist.get_rank()), source.pruned_layout(kept_layers, keep_mtp)
    arch = source.family.architecture(source.config)

    def add(hf_name: str, tensor: torch.Tensor) -> None:
        new_name = source.renamed(hf_name, kept_layers)
        assert new_name is not None  # pruned layers are not among the tensors
        writer.add(layout.written_name(new_name), tensor)

    def write(gathered: Gathered | None) -> None:
        if gathered is None:
            writer.close()
        elif gathered.rule.export:
            for hf_name, tensor in gathered.rule.merge(gathered.parts, arch).items():
                tensor = _as_stored(tensor, source, hf_name)
                add(hf_name, tensor)
                for copy in source.copies(hf_name, keep_mtp):
                    add(copy, tensor.clone())

    def close() -> None:
        built = _of_mtp(source) if model.config.mtp_num_layers else set()
        unread = source.carried(kept_layers) + [name for name in source.mtp_own() if keep_mtp and name not in built]
        for hf_name in unread if dist.get_rank() == 0 else ():
            add(hf_name, source.read(hf_name))
        writer.close()

    weights = list(_exported(model, source, kept_layers, whole))
    write_gathered(shares(weights, source, max_shard_bytes), write, close, folder)
    shards = all_gather_objects(writer.written)

    def finish() -> None:
        with one_line(folder):
            finish_shards(folder, [shard for by_rank in shards for shard in by_rank], layout, max_shard_bytes)

    on_rank0(finish)


def write_gathered(
    gathered: Iterable[T], write: Callable[[T], object], close: Callable[[], object], folder: Path
) -> None:
    """Write weights one by one as they are gathered from all ranks, and close the files. Collective.

    After an error or a request to stop, this rank takes part in the remaining collectives, because the other ranks
    would wait for it.

    Args:
        gathered: the weights; each step of the iteration is collective.
        write: writes one of them, if this rank is the one that does.
        close: writes what is pending.
        folder: where the files are, for error messages.

    Raises:
        MegapruneError: a rank can't write. Raised on every rank.
        RunStopped: a rank was asked to stop. Raised on every rank.
    """
    error: MegapruneError | None = None

    def attempt(step: Callable[[], object]) -> None:
        nonlocal error
        try:
            if error is None and not stopping.is_due("export"):
                step()
        except MegapruneError as met:
            error = met
        except OSError as met:
            error = MegapruneError(explain(met, folder))

    for weight in gathered:
        attempt(partial(write, weight))
    attempt(close)
    wait_for_all()
    raise_together(error)
    stop_if_asked("export", "while it exports weights")


def _exported(
    model: PipelineModel, source: TensorSource, kept_layers: Sequence[int], whole: bool
) -> Iterator[tuple[WeightRule, torch.Tensor]]:
    """Yield the rule and this rank's part of each weight of the export that it holds a part of.

    The arguments are those of `export_weights`.
    """
    rules = rules_by_parameter(source, uses_transformer_engine(model))
    for name, parameter in model.named_weights():
        rule = rules[source_name(name, None if whole else kept_layers)]
        if source.renamed(rule.hf[0], kept_layers) is not None and not _is_second_embedding(name):
            yield rule, parameter.detach()


def _is_second_embedding(name: str) -> bool:
    """Return whether a parameter is the copy of the embedding that MTP layers need on the last stage."""
    return name.startswith("embedding.") and not parallel_state.is_pipeline_first_stage()


def _of_mtp(source: TensorSource) -> set[str]:
    """Return the HF names of the tensors that a model's MTP layers hold."""
    arch = source.family.architecture(source.config)
    rules = mtp_parameter_rules(source.family, arch, len(source.mtp_layers))
    return {name for rule in rules if not rule.carried for name in rule.hf}


def _as_stored(tensor: torch.Tensor, source: TensorSource, hf_name: str) -> torch.Tensor:
    """Return the weight in the source's dtype, or the source's tensor if the two differ only by the run's rounding."""
    dtype = source.dtype(hf_name)
    if torch.finfo(tensor.dtype).eps > torch.finfo(dtype).eps:
        stored = source.read(hf_name)
        if torch.equal(stored.to(tensor.dtype), tensor.cpu()):
            return stored
    return tensor.to(dtype)


@torch.no_grad()
def round_to_source_dtype(model: PipelineModel, source: TensorSource, model_layers: Sequence[int] | None) -> None:
    """Round the weights to the dtypes of the export, so that the exported model is the one that is measured.

    Args:
        model: this rank's part of the model.
        source: the HF checkpoint that the model was imported from.
        model_layers: source layers that the model consists of; None means all.
    """
    rules = rules_by_parameter(source, uses_transformer_engine(model))
    for name, parameter in model.named_weights():
        dtype = source.dtype(rules[source_name(name, model_layers)].hf[0])
        parameter.copy_(parameter.to(dtype))


def gather_over_tensor_parallel(shard: torch.Tensor) -> list[torch.Tensor]:
    """Return the shards of all tensor-parallel ranks, in order of rank. Collective."""
    return gather_over(shard, parallel_state.get_tensor_model_parallel_group())


def gather_shards(shard: torch.Tensor, rule: WeightRule) -> list[torch.Tensor]:
    """Return the shards of all ranks that share the rule's parameter, in order of rank. Collective."""
    if rule.shard.dim is None:
        return [shard]
    if rule.expert:
        return gather_over(shard, parallel_state.get_expert_tensor_parallel_group())
    return gather_over_tensor_parallel(shard)


def gather_over(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Return the tensors, all of one shape, of the ranks of a group, in order of rank. Collective."""
    if group.size() == 1:
        return [shard]
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return parts


def is_first_holder(rule: WeightRule) -> bool:
    """Return whether this rank is the first of those that hold the rule's parameter or a shard of it."""
    if rule.expert:
        return expert_tensor_parallel().rank == 0 and parallel_state.get_expert_data_parallel_rank() == 0
    return tensor_parallel().rank == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
