"""LoRA adapters of a built model: initialization, which does not depend on the parallel layout, and export to PEFT."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megaprune.mcore.hf_weights import (
    gather_over,
    gather_shards,
    is_first_holder,
    rules_by_parameter,
    write_gathered,
)
from megaprune.mcore.layers.lora import LoRAOptions, adapted_layers, add_adapters, initialize_adapter
from megaprune.mcore.parallel import all_gather_objects, on_rank0
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.models import Architecture, WeightRule
from megaprune.models.names import name_in_layer, source_name, without_expert
from megaprune.utils.disk import one_line
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import ShardWriter, join_shards

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT reads one file. It is joined from parts of this size, so that a rank buffers one part at a time.
PART_BYTES = 10**9

# HF module name -> its A [r, in] and B [out, r]
_Adapters = dict[str, tuple[Tensor, Tensor]]


def attach_adapters(
    model: PipelineModel, options: LoRAOptions, seed: int, kept_layers: Sequence[int] | None = None
) -> None:
    """Freeze an imported model and attach freshly initialized adapters.

    Args:
        model: this rank's part of the model.
        options: rank, alpha and target modules.
        seed: seed of the initialization.
        kept_layers: source layers that the model consists of; None means all. An adapter is seeded by its layer's
            number in the source. It is therefore the same whether pruned layers are removed or bypassed.
    """
    add_adapters(model, options)
    for name, layer in adapted_layers(model).items():
        initialize_adapter(layer, source_name(name, kept_layers), seed)


@torch.no_grad()
def export_adapter(
    model: PipelineModel,
    source: TensorSource,
    kept_layers: Sequence[int],
    folder: Path,
    options: LoRAOptions,
    base_model: str,
    whole: bool = False,
    max_part_bytes: int = PART_BYTES,
) -> None:
    """Write the adapters in PEFT's format for the pruned model. Collective.

    Adapters are gathered one layer at a time.

    Args:
        model: this rank's part of the model with adapters.
        source: the HF checkpoint that the model was imported from.
        kept_layers: source layers whose adapters are exported.
        folder: an existing folder on a file system that all ranks share.
        options: rank, alpha and target modules of the adapters.
        base_model: name or path of the pruned model, for adapter_config.json.
        whole: whether the model still holds the pruned layers, too.
        max_part_bytes: size limit of the parts that the file is joined from.

    Raises:
        MegapruneError: the folder cannot be written. Raised on every rank.
    """
    writer = ShardWriter(folder, max_part_bytes, dist.get_rank())
    targets: set[str] = set()

    def write(gathered: tuple[_Adapters, bool]) -> None:
        adapters, writes = gathered
        for name, matrices in adapters.items():
            new_name = source.renamed(name, kept_layers)
            if new_name is None or not writes:
                continue
            in_layer = name_in_layer(name)
            for pattern, loaded in source.family.modules_in_transformers:
                in_layer, new_name = (re.sub(pattern, loaded, text) for text in (in_layer, new_name))
            targets.add(in_layer)
            for which, matrix in zip("AB", matrices, strict=True):
                writer.add(f"base_model.model.{_peft_name(new_name, options)}.lora_{which}.weight", matrix)

    write_gathered(_hf_adapters(model, source, None if whole else kept_layers), write, writer.close, folder)
    written = all_gather_objects((writer.written, targets))

    def finish() -> None:
        all_targets = {name for _, found in written for name in found}
        config = _peft_config(all_targets, options, base_model, _stacks_experts(source))
        with one_line(folder):
            join_shards(folder, [shard for shards, _ in written for shard in shards], _WEIGHTS)
            (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    on_rank0(finish)


def _hf_adapters(
    model: PipelineModel, source: TensorSource, model_layers: Sequence[int] | None
) -> Iterator[tuple[_Adapters, bool]]:
    """Yield adapters under their HF names in the source, and whether this rank writes them. Collective."""
    arch, rules = source.family.architecture(source.config), rules_by_parameter(source)
    groups: dict[str, list[tuple[WeightRule, Tensor, Tensor]]] = {}
    for name, layer in adapted_layers(model).items():
        rule = rules[source_name(f"{name}.weight", model_layers)]
        group = groups.setdefault(without_expert(name), [])
        group.append((rule, layer.lora_a.detach(), layer.lora_b.detach()))
    for group in groups.values():
        writes = is_first_holder(group[0][0])
        whole = [_merged(*adapter, arch) for adapter in group]
        if group[0][0].expert and _stacks_experts(source):
            yield _stacked(whole), writes and parallel_state.get_expert_model_parallel_rank() == 0
        else:
            for adapters in whole:
                yield adapters, writes


def _merged(rule: WeightRule, lora_a: Tensor, lora_b: Tensor, arch: Architecture) -> _Adapters:
    """Return the gathered adapter of a Megatron layer, split into the HF modules that the layer fuses; they share A."""
    if rule.shard.dim == 1:
        adapters = {rule.hf[0]: (torch.cat(gather_shards(lora_a, rule), dim=1), lora_b)}
    else:
        parts = rule.merge(gather_shards(lora_b, rule), arch)
        # Copies of A, because a safetensors file cannot hold tensors that share memory.
        adapters = {name: (lora_a.clone(), part) for name, part in parts.items()}
    return {name.removesuffix(".weight"): matrices for name, matrices in adapters.items()}


def _stacked(local: Sequence[_Adapters]) -> _Adapters:
    """Return the adapter of the stacked parameter of all experts in PEFT's layout. Collective.

    The parameter is gate_up_proj [e, 2f, h] or down_proj [e, h, f]. PEFT holds A as [e * r, in] with the expert as the
    slow index, and B as [out, r * e] with the expert as the fast index.

    Args:
        local: the adapters of this rank's experts, in order.
    """
    names = [name.rpartition(".") for name in local[0]]
    experts = names[0][0].rpartition(".")[0]
    parameter = "gate_up_proj" if len(names) == 2 else "down_proj"
    stacks = (
        [next(iter(adapters.values()))[0] for adapters in local],
        [torch.cat([lora_b for _, lora_b in adapters.values()]) for adapters in local],
    )
    group = parallel_state.get_expert_model_parallel_group()
    lora_a, lora_b = (torch.cat(gather_over(torch.stack(stack), group)) for stack in stacks)
    return {f"{experts}.{parameter}": (lora_a.flatten(0, 1), lora_b.permute(1, 2, 0).flatten(1))}


def _stacks_experts(source: TensorSource) -> bool:
    """Return whether the HF model holds the weights of all experts of a layer in one stacked parameter."""
    return source.family.stacks_experts and source.family.architecture(source.config).num_experts > 0


def _peft_name(name: str, options: LoRAOptions) -> str:
    """Return PEFT's name for an adapted module or stacked parameter.

    PEFT wraps the module that holds a stacked parameter, once for each adapted parameter of that module.
    """
    module, _, parameter = name.rpartition(".")
    if not module.endswith(".experts") or parameter not in ("gate_up_proj", "down_proj"):
        return name
    inner = parameter == "gate_up_proj" and "linear_fc2" in options.targets
    return f"{module}.base_layer" if inner else module


def _peft_config(targets: set[str], options: LoRAOptions, base_model: str, stacks_experts: bool) -> dict[str, Any]:
    """Return the content of adapter_config.json.

    Args:
        targets: modules and stacked parameters with adapters, named relative to their layer.
    """
    # In a model with stacked experts, PEFT reads an MLP projection in target_modules as the experts' projection of an
    # older checkpoint format. Names in target_parameters are taken literally.
    as_parameters = {name for name in targets if stacks_experts and name.startswith("mlp.")}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in targets - as_parameters}),
    }
    if as_parameters:
        config["target_parameters"] = sorted(
            name if name.startswith("mlp.experts.") else f"{name}.weight" for name in as_parameters
        )
    return config
