"""Weights of a built model: HF tensors into each rank's shards, and shards back into HF tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megaprune.mcore.builder import uses_transformer_engine
from megaprune.mcore.layers.lora import is_adapter
from megaprune.mcore.parallel import expert_tensor_parallel, on_first_rank, raise_together, tensor_parallel
from megaprune.models import WeightRule
from megaprune.models.names import source_name, with_expert, with_layer
from megaprune.models.shards import TensorParallel
from megaprune.utils.disk import explain, one_line
from megaprune.utils.errors import MegapruneError
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import ShardWriter, finish_shards


def global_weights(model: GPTModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters (adapters apart) and routers' biases under the names that they have in the whole model, whatever
    this rank's pipeline stage and experts."""
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("router.expert_bias"))
    for name, weight in chain(model.named_parameters(), buffers):
        if not is_adapter(name):
            yield global_name(name, model), weight


def global_name(name: str, model: GPTModel) -> str:
    """The name in the whole model of a parameter or module of this rank's part."""

    def first_expert() -> int:
        local = model.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        return local * parallel_state.get_expert_model_parallel_rank()

    name = with_layer(name, lambda layer: model.decoder.layers[layer].layer_number - 1)
    return with_expert(name, lambda expert: first_expert() + expert)


def rules_by_parameter(source: TensorSource, transformer_engine: bool = False) -> dict[str, WeightRule]:
    """The rule of each Megatron parameter of the source model, by its name under the layer spec in use."""
    rules: dict[str, WeightRule] = {}
    for rule in source.family.rules(source.config):
        if transformer_engine:
            rule = replace(rule, megatron=rule.te or rule.megatron, shard=rule.te_shard or rule.shard)
        rules[rule.megatron] = rule
    return rules


def _cut(rule: WeightRule) -> TensorParallel:
    """This rank's place among the ranks that share the rule's parameter."""
    return expert_tensor_parallel() if rule.expert else tensor_parallel()


@torch.no_grad()
def import_weights(model: GPTModel, source: TensorSource, kept_layers: Sequence[int] | None = None) -> None:
    """Fills this rank's parameters from the HF folder, reading only its slices. Collective.

    Args:
        kept_layers: source layers that the model consists of; None means all.

    Raises:
        MegapruneError: a weight is missing, has another shape, or is not finite. Raised on every rank.
    """
    arch = source.family.architecture(source.config)
    rules = rules_by_parameter(source, uses_transformer_engine(model))
    error = None
    try:
        for name, parameter in global_weights(model):
            rule = rules[source_name(name, kept_layers)]
            shard, hf_name = rule.read(source, arch, _cut(rule)), rule.hf[0]
            if shard.shape != parameter.shape:
                raise MegapruneError(
                    f"{source.folder}: {source.shown(hf_name)} has the wrong shape: its part for {name} is "
                    f"{tuple(shard.shape)}, config.json makes it {tuple(parameter.shape)}"
                )
            if not torch.isfinite(shard).all():
                culprit = source.shown(next(hf for hf in rule.hf if not torch.isfinite(source.read(hf)).all()))
                raise MegapruneError(f"{source.folder}: {culprit} holds values that are not finite (NaN or infinity)")
            parameter.copy_(shard)
    except MegapruneError as met:
        error = met
    raise_together(error)


@torch.no_grad()
def export_weights(
    model: GPTModel,
    source: TensorSource,
    kept_layers: Sequence[int],
    folder: Path,
    max_shard_bytes: int,
    whole: bool = False,
    keep_mtp: bool = True,
) -> None:
    """Writes the model as HF safetensors with the source's dtypes, gathered tensor by tensor. Collective.

    A weight stored in fp32 that a bf16 run did not train keeps its bits.

    Each pipeline stage writes its own files, and each rank its own experts (by the first rank of those that share
    them), into a folder that all can see.

    Args:
        kept_layers: source layers that are exported.
        whole: the model still holds the other layers, too.
        keep_mtp: carry the source's MTP layers along, which no training here touches, behind the kept layers; their
            copies of embedding and output layer are written anew, as that of a tied embedding is.
    """
    model_layers = None if whole else kept_layers
    arch = source.family.architecture(source.config)
    rules = rules_by_parameter(source, uses_transformer_engine(model))
    error, shards = None, []
    writer, layout = ShardWriter(folder, max_shard_bytes, dist.get_rank()), source.pruned_layout(kept_layers, keep_mtp)

    def add(hf_name: str, tensor: torch.Tensor) -> None:
        new_name = source.renamed(hf_name, kept_layers)
        assert new_name is not None  # only kept layers' tensors come here
        writer.add(layout.written_name(new_name), tensor)

    try:
        for name, parameter in global_weights(model):
            rule = rules[source_name(name, model_layers)]
            if source.renamed(rule.hf[0], kept_layers) is None:
                continue
            parts = gather_shards(parameter.detach(), rule)
            if not (rule.export and is_first_holder(rule)):
                continue
            for hf_name, tensor in rule.merge(parts, arch).items():
                tensor = _as_stored(tensor, source, hf_name)
                add(hf_name, tensor)
                for copy in source.copies(hf_name, keep_mtp):
                    add(copy, tensor.clone())
        if dist.get_rank() == 0 and keep_mtp:
            for hf_name in source.mtp_own():
                add(hf_name, source.read(hf_name))
        shards = writer.close()
    except OSError as met:
        error = MegapruneError(explain(met, folder))
    raise_together(error)
    gathered: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, shards)

    def finish() -> None:
        with one_line(folder):
            finish_shards(folder, [shard for by_rank in gathered for shard in by_rank], layout, max_shard_bytes)

    on_first_rank(finish)


def _as_stored(tensor: torch.Tensor, source: TensorSource, hf_name: str) -> torch.Tensor:
    """The weight in the source's dtype; the source's own bits where nothing but the run's coarser dtype changed it."""
    dtype = source.dtype(hf_name)
    if torch.finfo(tensor.dtype).eps > torch.finfo(dtype).eps:
        stored = source.read(hf_name)
        if torch.equal(stored.to(tensor.dtype), tensor.cpu()):
            return stored
    return tensor.to(dtype)


@torch.no_grad()
def round_to_source_dtype(model: GPTModel, source: TensorSource, model_layers: Sequence[int] | None) -> None:
    """Rounds the weights to what the export will hold, so that what is measured is what is shipped.

    Args:
        model_layers: source layers that the model consists of; None means all.
    """
    rules = rules_by_parameter(source, uses_transformer_engine(model))
    for name, parameter in global_weights(model):
        dtype = source.dtype(rules[source_name(name, model_layers)].hf[0])
        parameter.copy_(parameter.to(dtype))


def gather_over_tensor_parallel(shard: torch.Tensor) -> list[torch.Tensor]:
    """The shards of all tensor-parallel ranks, in order."""
    return gather_over(shard, parallel_state.get_tensor_model_parallel_group())


def gather_shards(shard: torch.Tensor, rule: WeightRule) -> list[torch.Tensor]:
    """The shards of all ranks that share the rule's parameter, in order."""
    if rule.shard.dim is None:
        return [shard]
    if rule.expert:
        return gather_over(shard, parallel_state.get_expert_tensor_parallel_group())
    return gather_over_tensor_parallel(shard)


def gather_over(shard: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """The tensors, of one shape, of a group's ranks, in order."""
    if group.size() == 1:
        return [shard]
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return parts


def is_first_holder(rule: WeightRule) -> bool:
    """Whether this rank is the first of those that hold the rule's parameter, or a part of it."""
    if rule.expert:
        return expert_tensor_parallel().rank == 0 and parallel_state.get_expert_data_parallel_rank() == 0
    return tensor_parallel().rank == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
