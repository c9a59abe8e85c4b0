"""The vocabulary in which a family declares itself: weight rules, architecture, and what pruning edits.

A family is data. The conversion engine (`megaprune.weights`) and the model builder (`megaprune.mcore`) read it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from megaprune.models.rope import RopeScaling, read_rope
from megaprune.models.settings import HFConfig, flag, layer_types, number, text, whole, whole_or_none
from megaprune.utils.errors import MegapruneError


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

    Names may contain ``{layer}``, the global layer index from 0, and ``{expert}``, the global expert index. Under
    Transformer Engine's layer spec a parameter may have another name (``te``: norms are fused into the linear layer
    behind them, experts are grouped) or be cut otherwise (``te_shard``). Parameters of routed experts (``expert``) are
    cut over expert-tensor-parallel ranks. A rule with ``export=False`` is a second copy of tensors that another rule
    exports.
    """

    megatron: str
    hf: tuple[str, ...]
    shard: Shard
    te: str | None = None
    te_shard: Shard | None = None
    expert: bool = False
    export: bool = True

    def at(self, layer: int, expert: int = 0) -> "WeightRule":
        """The rule of one layer, and of one of its experts."""
        return replace(
            self,
            megatron=self.megatron.format(layer=layer, expert=expert),
            hf=tuple(name.format(layer=layer, expert=expert) for name in self.hf),
            te=self.te and self.te.format(layer=layer, expert=expert),
        )


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
        mla: multi-head latent attention (``transformer`` then holds keyword arguments of ``MLATransformerConfig``).
        sandwich_norm: attention and MLP have a norm behind them too.
        latent_norm_epsilon: of the norms within latent attention, where it is not the other norms'.
    """

    transformer: dict[str, Any]
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    mla: bool = False
    sandwich_norm: bool = False
    latent_norm_epsilon: float | None = None

    @property
    def num_layers(self) -> int:
        return self.transformer["num_layers"]

    @property
    def query_groups(self) -> int:
        return self.transformer.get("num_query_groups") or self.transformer["num_attention_heads"]

    @property
    def num_experts(self) -> int:
        """Routed experts in each MoE layer; 0 for a dense model."""
        return self.transformer.get("num_moe_experts", 0)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return bool(self.num_experts and self.transformer["moe_layer_freq"][layer])

    def pruned(self, kept_layers: Sequence[int]) -> "Architecture":
        """The architecture of these layers, in order."""
        fields = self.transformer | {"num_layers": len(kept_layers)}
        if self.num_experts:
            fields["moe_layer_freq"] = [self.transformer["moe_layer_freq"][layer] for layer in kept_layers]
        return replace(self, transformer=fields)

    @property
    def head_dim(self) -> int:
        return self.transformer["kv_channels"]


@dataclass(frozen=True)
class Family:
    """Everything that megaprune knows about one family of HF models.

    Args:
        model_type: ``model_type`` in config.json.
        architecture: HF config to Megatron-Core's terms. Raises ``MegapruneError`` for what can't be expressed.
        model_rules: weights outside the layers.
        layer_rules: weights of one layer; rules with ``expert`` stand for each of its experts.
        prune_config: edits a copy of the HF config for the kept layers (source indices, ascending).
        ignored: regular expressions of stored tensors that no model reads.
        mtp_keys: names under which config.json counts multi-token-prediction layers, where the family has any.
        stacks_experts: transformers' class, where it has one, holds the experts of a layer as stacked parameters; the
            code that comes with other families, as a module each.
    """

    model_type: str
    architecture: Callable[[HFConfig], Architecture]
    model_rules: Sequence[WeightRule]
    layer_rules: Callable[[Architecture, int], Sequence[WeightRule]]
    prune_config: Callable[[HFConfig, Sequence[int]], HFConfig]
    ignored: tuple[str, ...] = ()
    mtp_keys: tuple[str, ...] = ()
    stacks_experts: bool = True

    def rules(self, config: HFConfig) -> list[WeightRule]:
        """Every rule of a model with this config, layer by layer."""
        arch = self.architecture(config)
        rules = [tied_output_rule(rule) if arch.tied else rule for rule in self.model_rules]
        for layer in range(arch.num_layers):
            for rule in self.layer_rules(arch, layer):
                rules += [rule.at(layer, expert) for expert in range(arch.num_experts if rule.expert else 1)]
        return rules


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
        return replace(rule, hf=(EMBEDDING,), export=False)
    return rule


HF = "model.layers.{layer}."
MEGATRON = "decoder.layers.{layer}."
ATTENTION = MEGATRON + "self_attention."

GQA_RULES = (
    WeightRule(
        MEGATRON + "input_layernorm.weight",
        (HF + "input_layernorm.weight",),
        Shard.COPY,
        te=ATTENTION + "linear_qkv.layer_norm_weight",
    ),
    WeightRule(
        ATTENTION + "linear_qkv.weight",
        tuple(HF + f"self_attn.{x}_proj.weight" for x in "qkv"),
        Shard.QKV,
    ),
    WeightRule(ATTENTION + "linear_proj.weight", (HF + "self_attn.o_proj.weight",), Shard.ROW),
)

MLP_RULES = (
    WeightRule(
        MEGATRON + "mlp.linear_fc1.weight",
        (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
        Shard.GATED,
    ),
    WeightRule(MEGATRON + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), Shard.ROW),
)

EXPERT_RULES = (
    WeightRule(MEGATRON + "mlp.router.weight", (HF + "mlp.gate.weight",), Shard.COPY),
    WeightRule(
        MEGATRON + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        (HF + "mlp.experts.{expert}.gate_proj.weight", HF + "mlp.experts.{expert}.up_proj.weight"),
        Shard.GATED,
        te=MEGATRON + "mlp.experts.linear_fc1.weight{expert}",
        expert=True,
    ),
    WeightRule(
        MEGATRON + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        (HF + "mlp.experts.{expert}.down_proj.weight",),
        Shard.ROW,
        te=MEGATRON + "mlp.experts.linear_fc2.weight{expert}",
        expert=True,
    ),
)


def mlp_norm_rule(hf_norm: str, moe: bool) -> WeightRule:
    """The norm before the MLP, which Transformer Engine fuses into a dense MLP but not into experts."""
    return WeightRule(
        MEGATRON + "pre_mlp_layernorm.weight",
        (HF + hf_norm + ".weight",),
        Shard.COPY,
        te=None if moe else MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    )


DENSE_LAYER_RULES = GQA_RULES + (mlp_norm_rule("post_attention_layernorm", moe=False),) + MLP_RULES

QKV_BIAS_RULES = (
    WeightRule(ATTENTION + "linear_qkv.bias", tuple(HF + f"self_attn.{x}_proj.bias" for x in "qkv"), Shard.QKV),
)

QK_NORM_RULES = (
    WeightRule(ATTENTION + "q_layernorm.weight", (HF + "self_attn.q_norm.weight",), Shard.COPY),
    WeightRule(ATTENTION + "k_layernorm.weight", (HF + "self_attn.k_norm.weight",), Shard.COPY),
)


def refuse_attention_bias(config: HFConfig) -> None:
    """Some families may carry biases that their Megatron layers would not.

    Raises:
        MegapruneError: this one does.
    """
    refuse_true(config, "attention_bias")


def refuse_true(config: HFConfig, key: str) -> None:
    """Checks that a switch is off, or absent.

    Raises:
        MegapruneError: it is on.
    """
    if flag(config, key, False):
        raise MegapruneError(f"{config.get('model_type')}: {key} true is not supported")


def gqa_architecture(
    config: HFConfig, max_positions: int, head_dim: int | None = None, groups: int | None = None, **transformer: Any
) -> Architecture:
    """Grouped-query attention, RMSNorm, SwiGLU and RoPE: what the GQA families share.

    Args:
        max_positions, head_dim, groups: transformers' defaults for what config.json may leave out; without one, the
            head dimension follows from the hidden size, and each attention head has a key-value head of its own.

    Raises:
        MegapruneError: the config asks for something that this can't express, or lacks a key.
    """
    name = config.get("model_type")
    text(config, "hidden_act", "silu", only="silu")
    for switch in ("mlp_bias", "use_mrope"):
        refuse_true(config, switch)
    num_layers = whole(config, "num_hidden_layers")
    sliding = {t for t in layer_types(config, num_layers) if t != "full_attention"}
    if flag(config, "use_sliding_window", False) or sliding:
        raise MegapruneError(f"{name}: sliding-window attention is not supported; set use_sliding_window to false")
    heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
    query_groups = whole_or_none(config, "num_key_value_heads", groups) or heads
    if head_dim is not None:
        channels = whole(config, "head_dim", head_dim)
    else:
        channels = whole_or_none(config, "head_dim", None) or hidden // heads
    if heads % query_groups:
        raise MegapruneError(f"{name}: {heads} attention heads can't share {query_groups} key-value heads evenly")
    if channels % 2 or not channels:
        raise MegapruneError(f"{name}: RoPE needs an even head dimension, not {channels}")
    fields = dict(
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=whole(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=query_groups,
        kv_channels=channels,
        layernorm_epsilon=number(config, "rms_norm_eps"),
    )
    positions = whole(config, "max_position_embeddings", max_positions)
    theta, scaling = read_rope(config, positions)
    return Architecture(
        transformer=fields | transformer,
        vocab_size=whole(config, "vocab_size"),
        max_position_embeddings=positions,
        rotary_base=theta,
        rope_scaling=scaling,
        tied=flag(config, "tie_word_embeddings", False),
    )


def prune_dense_config(config: HFConfig, kept: Sequence[int]) -> HFConfig:
    """What pruning edits in a dense model's config: the layer count, and the layers' types where they are listed."""
    pruned = dict(config, num_hidden_layers=len(kept))
    if config.get("layer_types"):
        pruned["layer_types"] = [config["layer_types"][layer] for layer in kept]
    return pruned


def prune_dense_prefix(config: HFConfig, kept: Sequence[int], dense_keys: Sequence[str]) -> HFConfig:
    """What pruning edits where MoE layers follow a prefix of dense ones, which pruning in order leaves a prefix.

    Args:
        dense_keys: names under which the config counts the dense layers.
    """
    pruned = prune_dense_config(config, kept)
    dense = sum(layer < config[dense_keys[0]] for layer in kept)
    return pruned | dict.fromkeys(dense_keys, dense)
