"""The vocabulary in which a family declares itself: weight rules, architecture, and what pruning edits.

A family is data. The conversion engine (`megaprune.weights`) and the model builder (`megaprune.mcore`) read it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from megaprune.errors import MegapruneError

HFConfig = dict[str, Any]


class Shard(Enum):
    """How a Megatron parameter is cut over tensor-parallel ranks, and from which HF tensors it is made."""

    COPY = "the same on every rank"
    COLUMN = "cut along the output dimension 0"
    ROW = "cut along the input dimension 1"
    VOCAB = "cut along dimension 0 after padding the vocabulary"
    QKV = "query, key and value interleaved by query group, then cut along dimension 0"
    GATED = "gate and up, each cut along dimension 0, then stacked"


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the HF tensors that it holds.

    Names may contain ``{layer}``, the global layer index from 0. ``te`` is the parameter's name under Transformer
    Engine's layer spec, where norms are fused into the linear layer behind them. A rule with ``export=False`` is a
    second copy of tensors that another rule exports.
    """

    megatron: str
    hf: tuple[str, ...]
    shard: Shard
    te: str | None = None
    export: bool = True

    def at(self, layer: int) -> "WeightRule":
        """The rule of one layer."""
        return WeightRule(
            self.megatron.format(layer=layer),
            tuple(name.format(layer=layer) for name in self.hf),
            self.shard,
            self.te and self.te.format(layer=layer),
            self.export,
        )


@dataclass(frozen=True)
class RopeScaling:
    """Scaling of RoPE's inverse frequencies: ``llama3`` (four numbers) or ``linear`` (the factor alone)."""

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class Architecture:
    """A model in Megatron-Core's terms.

    Args:
        transformer: keyword arguments of ``TransformerConfig``.
        vocab_size: rows of the embedding as stored by HF, before padding.
        max_position_embeddings: positions that the model was made for.
        rotary_base: RoPE's theta.
        rope_scaling: how RoPE is stretched, if it is.
        tied: the output layer shares the embedding's weight.
    """

    transformer: dict[str, Any]
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False

    @property
    def num_layers(self) -> int:
        return self.transformer["num_layers"]

    @property
    def query_groups(self) -> int:
        return self.transformer["num_query_groups"]

    @property
    def head_dim(self) -> int:
        return self.transformer["kv_channels"]


@dataclass(frozen=True)
class Family:
    """Everything that megaprune knows about one family of HF models.

    Args:
        model_type: ``model_type`` in config.json.
        architecture: HF config to Megatron-Core's terms. Raises ``MegapruneError`` for what can't be expressed.
        model_rules: weights outside the layers; ``layer_rules``: those of each layer.
        prune_config: edits a copy of the HF config for the kept layers (source indices, ascending).
        ignored: regular expressions of stored tensors that no model reads.
    """

    model_type: str
    architecture: Callable[[HFConfig], Architecture]
    model_rules: Sequence[WeightRule]
    layer_rules: Sequence[WeightRule]
    prune_config: Callable[[HFConfig, Sequence[int]], HFConfig]
    ignored: tuple[str, ...] = field(default=())

    def rules(self, config: HFConfig) -> list[WeightRule]:
        """Every rule of a model with this config, layer by layer."""
        arch = self.architecture(config)
        rules = [tied_output_rule(rule) if arch.tied else rule for rule in self.model_rules]
        return rules + [rule.at(layer) for layer in range(arch.num_layers) for rule in self.layer_rules]


EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

MODEL_RULES = (
    WeightRule("embedding.word_embeddings.weight", (EMBEDDING,), Shard.VOCAB),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Shard.COPY),
    WeightRule("output_layer.weight", (OUTPUT,), Shard.VOCAB),
)


def tied_output_rule(rule: WeightRule) -> WeightRule:
    """With tied embeddings the last pipeline stage holds a second copy of the embedding."""
    if rule.hf == (OUTPUT,):
        return WeightRule(rule.megatron, (EMBEDDING,), rule.shard, export=False)
    return rule


_HF = "model.layers.{layer}."
_MEGATRON = "decoder.layers.{layer}."
_ATTENTION = _MEGATRON + "self_attention."

GQA_LAYER_RULES = (
    WeightRule(
        _MEGATRON + "input_layernorm.weight",
        (_HF + "input_layernorm.weight",),
        Shard.COPY,
        te=_ATTENTION + "linear_qkv.layer_norm_weight",
    ),
    WeightRule(
        _ATTENTION + "linear_qkv.weight",
        tuple(_HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
        Shard.QKV,
    ),
    WeightRule(_ATTENTION + "linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Shard.ROW),
    WeightRule(
        _MEGATRON + "pre_mlp_layernorm.weight",
        (_HF + "post_attention_layernorm.weight",),
        Shard.COPY,
        te=_MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    ),
    WeightRule(
        _MEGATRON + "mlp.linear_fc1.weight",
        (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"),
        Shard.GATED,
    ),
    WeightRule(_MEGATRON + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Shard.ROW),
)

QKV_BIAS_RULES = (
    WeightRule(_ATTENTION + "linear_qkv.bias", tuple(_HF + f"self_attn.{x}_proj.bias" for x in "qkv"), Shard.QKV),
)

QK_NORM_RULES = (
    WeightRule(_ATTENTION + "q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), Shard.COPY),
    WeightRule(_ATTENTION + "k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), Shard.COPY),
)


def gqa_architecture(config: HFConfig, **transformer: Any) -> Architecture:
    """Grouped-query attention, RMSNorm, SwiGLU and RoPE: what the dense families share.

    Raises:
        MegapruneError: the config asks for something that this can't express, or lacks a key.
    """
    name = config.get("model_type")
    if config.get("hidden_act", "silu") != "silu":
        raise MegapruneError(f"{name}: hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("mlp_bias"):
        raise MegapruneError(f"{name}: mlp_bias true is not supported")
    sliding = {t for t in config.get("layer_types") or () if t != "full_attention"}
    if config.get("use_sliding_window") or sliding:
        raise MegapruneError(f"{name}: sliding-window attention is not supported; set use_sliding_window to false")
    try:
        heads = config["num_attention_heads"]
        fields = dict(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            layernorm_epsilon=config["rms_norm_eps"],
        )
        vocab_size = config["vocab_size"]
    except KeyError as error:
        raise MegapruneError(f"{name}: config.json lacks the key {error.args[0]!r}") from None
    theta, scaling = rope_parameters(config)
    return Architecture(
        transformer=fields | transformer,
        vocab_size=vocab_size,
        max_position_embeddings=config.get("max_position_embeddings", 4096),
        rotary_base=theta,
        rope_scaling=scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def rope_parameters(config: HFConfig) -> tuple[float, RopeScaling | None]:
    """RoPE's theta and scaling, from either spelling: ``rope_parameters``, or ``rope_theta`` and ``rope_scaling``.

    Raises:
        MegapruneError: the scaling is neither llama3 nor linear.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 1e4)
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    if rope_type == "default":
        return theta, None
    if rope_type not in ("llama3", "linear"):
        raise MegapruneError(
            f"{config.get('model_type')}: RoPE scaling {rope_type!r} is not supported, only 'default', 'linear' and "
            "'llama3'; remove the scaling from config.json if the model is used within its original context"
        )
    known = {k: rope[k] for k in RopeScaling.__dataclass_fields__ if k in rope and k != "rope_type"}
    return theta, RopeScaling(rope_type=rope_type, **known)


def prune_dense_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    """What pruning edits in a dense model's config: the layer count, and the layers' types where they are listed."""
    pruned = dict(config, num_hidden_layers=len(kept))
    if config.get("layer_types"):
        pruned["layer_types"] = [config["layer_types"][layer] for layer in kept]
    return pruned
