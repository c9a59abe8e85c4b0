"""Floating-point operations of a model, from config.json and the family's tables.

Matrix products count 2 operations for a multiply-add. As in Megatron-LM, causal attention counts the half of the score
matrix that is needed, and norms, activation functions and the embedding count nothing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megaprune.models import HFConfig, family_of
from megaprune.models.shapes import hf_shapes
from megaprune.models.sizes import output_cost
from megaprune.models.tables import Architecture, WeightRule


@dataclass(frozen=True)
class Flops:
    """Operations of the forward pass of a window: of weights and of attention, which has none."""

    weights: float
    attention: float

    @property
    def total(self) -> float:
        return self.weights + self.attention

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.weights + other.weights, self.attention + other.attention)


def layer_flops(config: HFConfig, seq_length: int) -> list[Flops]:
    """Return the forward operations of each layer for a window of `seq_length` tokens."""
    family = family_of(config)
    arch = family.architecture(config)
    attention = _attention(arch, seq_length)
    return [
        Flops(2.0 * seq_length * _products(family.layer_rules(arch, layer), arch, layer), attention)
        for layer in range(arch.num_layers)
    ]


def output_flops(config: HFConfig, seq_length: int) -> Flops:
    """Return the forward operations of the output layer for a window of `seq_length` tokens."""
    return Flops(2.0 * seq_length * output_cost(config), 0.0)


def step_flops(
    layers: Sequence[Flops],
    output: Flops,
    forward: Iterable[int],
    backward: Iterable[int],
    trained: Iterable[int],
    trains_output: bool,
) -> float:
    """Return the operations of a training step for one window. The backward pass needs two products for each one.

    Args:
        layers: of each layer of the model.
        output: of the output layer.
        forward: layers that run forward.
        backward: those of them through which the gradient passes.
        trained: those of them whose weights get gradients.
        trains_output: whether the output layer's weights get gradients.
    """
    total = output.total * (3 if trains_output else 2)
    total += sum(layers[layer].total for layer in forward)
    total += sum(layers[layer].weights + 2 * layers[layer].attention for layer in backward)
    return total + sum(layers[layer].weights for layer in trained)


def _products(rules: Iterable[WeightRule], arch: Architecture, layer: int) -> int:
    """Return the multiply-adds of a token in the matrices of a layer; of routed experts, in the chosen ones."""
    total = 0
    for rule in rules:
        shapes = hf_shapes(rule.at(layer).hf, arch).values()
        count = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
        total += count * (arch.transformer["moe_router_topk"] if rule.expert else 1)
    return total


def _attention(arch: Architecture, seq_length: int) -> float:
    """Return the forward operations of a layer's causal attention for a window."""
    settings, widths = arch.transformer, 2 * arch.head_dim if not arch.mla else 0
    if arch.mla:
        widths = settings["qk_head_dim"] + settings["qk_pos_emb_head_dim"] + settings["v_head_dim"]
    return float(settings["num_attention_heads"] * widths) * seq_length * seq_length
