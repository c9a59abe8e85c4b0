"""Parameter counts and costs of a model's layers, from config.json and the family's tables, without weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megaprune.models import HFConfig, family_of
from megaprune.models.shapes import hf_shapes
from megaprune.models.tables import EMBEDDING, Architecture, WeightRule
from megaprune.utils.errors import MegapruneError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Size:
    """Parameters, and those of them that a token passes through: of the routed experts, only the chosen ones."""

    total: int
    active: int

    def __add__(self, other: "Size") -> "Size":
        return Size(self.total + other.total, self.active + other.active)


def layer_sizes(config: HFConfig) -> list[Size]:
    """The size of each layer."""
    family = family_of(config)
    arch = family.architecture(config)
    return [_size(family.layer_rules(arch, layer), arch, layer) for layer in range(arch.num_layers)]


def model_size(config: HFConfig, kept_layers: Sequence[int] | None = None) -> Size:
    """The size of the model, or of the model of these layers, without MTP layers; tied weights count once."""
    family = family_of(config)
    arch, layers = family.architecture(config), layer_sizes(config)
    outside = [rule for rule in family.model_rules if not (arch.tied and rule.megatron.startswith("output_layer"))]
    kept = range(len(layers)) if kept_layers is None else kept_layers
    return sum((layers[layer] for layer in kept), _size(outside, arch))


@dataclass(frozen=True)
class Inventory:
    """The parts of a model: its size and its layers by kind."""

    size: Size
    dense_layers: int
    moe_layers: int


def inventory(config: HFConfig, kept_layers: Sequence[int] | None = None) -> Inventory:
    """The parts of the model, or of the model of these layers."""
    arch = family_of(config).architecture(config)
    kept = range(arch.num_layers) if kept_layers is None else kept_layers
    moe = sum(arch.is_moe(layer) for layer in kept)
    return Inventory(model_size(config, kept), len(kept) - moe, moe)


def layer_costs(config: HFConfig) -> list[int]:
    """Multiply-adds that each layer's weights do for a token."""
    return [size.active for size in layer_sizes(config)]


def cached_numbers(config: HFConfig, length: int) -> list[int]:
    """Numbers that each layer keeps in the KV cache of a sequence: keys and values, or MLA's latent and RoPE key.

    Args:
        length: tokens of the sequence; a layer with a sliding window keeps no more than the window.
    """
    arch = family_of(config).architecture(config)
    fields = arch.transformer
    if arch.mla:
        each = int(fields["kv_lora_rank"]) + int(fields["qk_pos_emb_head_dim"])
    else:
        each = 2 * arch.query_groups * arch.head_dim
    slides = fields.get("window_attn_skip_freq") or [0] * arch.num_layers
    window = fields["window_size"][0] + 1 if any(slides) else length
    return [each * (min(length, window) if slide else length) for slide in slides]


def bytes_per_weight(config: HFConfig) -> int:
    """Bytes of a weight in the exported model. Block-FP8 sources are exported in bf16.

    Raises:
        MegapruneError: config.json has a dtype that is not understood.
    """
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if config.get("quantization_config"):
        return _BYTES["bfloat16"]
    if dtype not in _BYTES:
        raise MegapruneError(f"config.json: the size of dtype {dtype!r} is not known: give the target in parameters")
    return _BYTES[dtype]


def output_cost(config: HFConfig) -> int:
    """Multiply-adds that the output layer does for a token."""
    return math.prod(hf_shapes([EMBEDDING], family_of(config).architecture(config))[EMBEDDING])


def _size(rules: Iterable[WeightRule], arch: Architecture, layer: int = 0) -> Size:
    total = active = 0
    for rule in rules:
        count = sum(map(math.prod, hf_shapes(rule.at(layer).hf, arch).values()))
        total += count * (arch.num_experts if rule.expert else 1)
        active += count * (arch.transformer["moe_router_topk"] if rule.expert else 1)
    return Size(total, active)
