"""Weights of a built model: HF tensors into each rank's shards, and shards back into HF tensors."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megaprune.errors import MegapruneError
from megaprune.mcore.parallel import raise_together, tensor_parallel
from megaprune.models import WeightRule
from megaprune.weights.shards import merge_shards, read_shard
from megaprune.weights.source import HFSource, renamed
from megaprune.weights.writer import ShardWriter, finish_shards

_LAYER = re.compile(r"^(decoder\.layers\.)(\d+)(\..+)$")


def global_parameters(model: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Parameters under the names that they have in the whole model, whatever the pipeline stage."""
    for name, parameter in model.named_parameters():
        match = _LAYER.match(name)
        if match:
            layer = model.decoder.layers[int(match.group(2))].layer_number - 1
            name = f"{match.group(1)}{layer}{match.group(3)}"
        yield name, parameter


def rules_by_parameter(source: HFSource) -> dict[str, WeightRule]:
    """The rule of each Megatron parameter of the source model, under its local and its Transformer Engine name."""
    rules: dict[str, WeightRule] = {}
    for rule in source.family.rules(source.config):
        rules[rule.megatron] = rule
        if rule.te:
            rules[rule.te] = rule
    return rules


@torch.no_grad()
def import_weights(model: GPTModel, source: HFSource, kept_layers: Sequence[int] | None = None) -> None:
    """Fills this rank's parameters from the HF folder, reading only its slices. Collective.

    Args:
        kept_layers: source layers that the model consists of; None means all.

    Raises:
        MegapruneError: a weight is missing, has another shape, or is not finite. Raised on every rank.
    """
    arch, tp = source.family.architecture(source.config), tensor_parallel()
    rules = rules_by_parameter(source)
    error = None
    try:
        for name, parameter in global_parameters(model):
            shard = read_shard(rules[_source_name(name, kept_layers)], source, arch, tp)
            hf_name = rules[_source_name(name, kept_layers)].hf[0]
            if shard.shape != parameter.shape:
                raise MegapruneError(
                    f"{source.folder}: {hf_name} has the wrong shape: its part for {name} is {tuple(shard.shape)}, "
                    f"config.json makes it {tuple(parameter.shape)}"
                )
            if not torch.isfinite(shard).all():
                raise MegapruneError(f"{source.folder}: {hf_name} holds values that are not finite (NaN or infinity)")
            parameter.copy_(shard)
    except MegapruneError as met:
        error = met
    raise_together(error)


@torch.no_grad()
def export_weights(
    model: GPTModel, source: HFSource, kept_layers: Sequence[int], folder: Path, max_shard_bytes: int
) -> None:
    """Writes the model as HF safetensors with the source's dtypes, gathered tensor by tensor. Collective.

    Each pipeline stage writes its own files (by its first tensor-parallel rank of the first replica), into a folder
    that all can see.
    """
    arch = source.family.architecture(source.config)
    rules = rules_by_parameter(source)
    error, shards = None, []
    writes = tensor_parallel().rank == 0 and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    writer = ShardWriter(folder, max_shard_bytes, parallel_state.get_pipeline_model_parallel_rank())
    try:
        for name, parameter in global_parameters(model):
            rule = rules[_source_name(name, kept_layers)]
            parts = gather_over_tensor_parallel(parameter.detach())
            if not (writes and rule.export):
                continue
            for hf_name, tensor in merge_shards(rule, parts, arch).items():
                writer.add(renamed(hf_name, kept_layers), tensor.to(source.dtype(hf_name)))
        shards = writer.close() if writes else []
    except OSError as met:
        error = MegapruneError(f"{folder} can't be written: {met}")
    raise_together(error)
    gathered: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, shards)
    if dist.get_rank() == 0:
        finish_shards(folder, [shard for by_rank in gathered for shard in by_rank])
    dist.barrier()


@torch.no_grad()
def round_to_source_dtype(model: GPTModel, source: HFSource, kept_layers: Sequence[int]) -> None:
    """Rounds the weights to what the export will hold, so that what is measured is what is shipped."""
    rules = rules_by_parameter(source)
    for name, parameter in global_parameters(model):
        dtype = source.dtype(rules[_source_name(name, kept_layers)].hf[0])
        parameter.copy_(parameter.to(dtype))


def gather_over_tensor_parallel(shard: torch.Tensor) -> list[torch.Tensor]:
    """The shards of all tensor-parallel ranks, in order."""
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1:
        return [shard]
    parts = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(parts, shard.contiguous(), group=group)
    return parts


def _source_name(name: str, kept_layers: Sequence[int] | None) -> str:
    """The name that a pruned model's parameter has in the source model."""
    match = _LAYER.match(name)
    if not match or kept_layers is None:
        return name
    return f"{match.group(1)}{kept_layers[int(match.group(2))]}{match.group(3)}"
