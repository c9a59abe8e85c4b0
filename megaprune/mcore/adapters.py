"""LoRA adapters of a built model: fresh ones, the same at every layout, and their export in PEFT's format."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megaprune.mcore.hf_weights import (
    gather_over,
    gather_shards,
    global_name,
    is_first_holder,
    rules_by_parameter,
)
from megaprune.mcore.layers.lora import LoRAOptions, adapted_layers, add_adapters, initialize_adapter
from megaprune.mcore.parallel import on_first_rank, raise_together
from megaprune.models import Architecture, WeightRule
from megaprune.models.names import name_in_layer, source_name, without_expert
from megaprune.utils.disk import explain, one_line
from megaprune.utils.errors import MegapruneError
from megaprune.weights.tensor_source import TensorSource
from megaprune.weights.writer import ShardWriter, WrittenShard, join_shards

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# The parts of the one file that PEFT reads: what a rank keeps in memory until it is written.
_PART_BYTES = 10**9

# Names of HF modules, each with its A [r, in] and B [out, r].
_Adapters = dict[str, tuple[Tensor, Tensor]]


def attach_adapters(model: GPTModel, options: LoRAOptions, seed: int, kept_layers: Sequence[int] | None = None) -> None:
    """Freezes an imported model and gives it fresh adapters.

    Args:
        kept_layers: source layers that the model consists of; None means all. A layer's adapter is drawn by its
            number in the source, and so is the same where pruned layers are gone and where they are bypassed.
    """
    add_adapters(model, options)
    for name, layer in adapted_layers(model).items():
        initialize_adapter(layer, source_name(global_name(name, model), kept_layers), seed)


@torch.no_grad()
def export_adapter(
    model: GPTModel,
    source: TensorSource,
    kept_layers: Sequence[int],
    folder: Path,
    options: LoRAOptions,
    base_model: str,
    whole: bool = False,
) -> None:
    """Writes the adapters as PEFT loads them onto the pruned model, gathered layer by layer. Collective.

    Args:
        kept_layers: source layers whose adapters are exported.
        folder: exists, and all ranks can see it.
        base_model: name or path of the pruned model.
        whole: the model still holds the other layers, too.
    """
    writer = ShardWriter(folder, _PART_BYTES, dist.get_rank())
    error: MegapruneError | None = None
    mine: tuple[list[WrittenShard], set[str]] = [], set()
    try:
        targets: set[str] = set()
        for names, writes in _hf_adapters(model, source, None if whole else kept_layers):
            for name, matrices in names.items():
                new_name = source.renamed(name, kept_layers)
                if new_name is None or not writes:
                    continue
                targets.add(name_in_layer(name))
                for which, matrix in zip("AB", matrices, strict=True):
                    writer.add(f"base_model.model.{_peft_name(new_name, options)}.lora_{which}.weight", matrix)
        mine = (writer.close(), targets)
    except OSError as met:
        error = MegapruneError(explain(met, folder))
    raise_together(error)
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)

    def finish() -> None:
        targets = set().union(*(targets for _, targets in gathered))
        config = _peft_config(targets, options, base_model, _stacks_experts(source))
        with one_line(folder):
            join_shards(folder, [shard for shards, _ in gathered for shard in shards], _WEIGHTS)
            (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    on_first_rank(finish)


def _hf_adapters(
    model: GPTModel, source: TensorSource, model_layers: Sequence[int] | None
) -> Iterator[tuple[_Adapters, bool]]:
    """Adapters under HF's names in the source, and whether they are this rank's to write. Collective."""
    arch, rules = source.family.architecture(source.config), rules_by_parameter(source)
    groups: dict[str, list[tuple[WeightRule, Tensor, Tensor]]] = {}
    for name, layer in adapted_layers(model).items():
        rule = rules[source_name(global_name(f"{name}.weight", model), model_layers)]
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
    """One Megatron layer's adapter, whole, for each of the HF modules that make up the layer: they share A."""
    if rule.shard.dim == 1:
        adapters = {rule.hf[0]: (torch.cat(gather_shards(lora_a, rule), dim=1), lora_b)}
    else:
        parts = rule.merge(gather_shards(lora_b, rule), arch)
        # each a copy: a safetensors file holds no tensor twice
        adapters = {name: (lora_a.clone(), part) for name, part in parts.items()}
    return {name.removesuffix(".weight"): matrices for name, matrices in adapters.items()}


def _stacked(local: Sequence[_Adapters]) -> _Adapters:
    """The adapter of all experts' stacked parameter (gate_up_proj [e, 2f, h] or down_proj [e, h, f]) as PEFT holds it:
    A [e * r, in] expert by expert, B [out, r * e] with the expert running fastest."""
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
    return source.family.stacks_experts and source.family.architecture(source.config).num_experts > 0


def _peft_name(name: str, options: LoRAOptions) -> str:
    """PEFT wraps the module of a stacked parameter; where it holds two that are adapted, twice."""
    module, _, parameter = name.rpartition(".")
    if not module.endswith(".experts") or parameter not in ("gate_up_proj", "down_proj"):
        return name
    inner = parameter == "gate_up_proj" and "linear_fc2" in options.targets
    return f"{module}.base_layer" if inner else module


def _peft_config(targets: set[str], options: LoRAOptions, base_model: str, stacks_experts: bool) -> dict:
    """adapter_config.json for these modules and stacked parameters, named within their layers."""
    # PEFT takes the names of MLPs' projections among the modules for the experts' of old checkpoints; as parameters
    # they are what they say.
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
