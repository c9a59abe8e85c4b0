"""Vocabulary with which a family declares itself: weight rules, architecture, and the changes of pruning.

A family is data. The conversion engine (`megaprune.weights`) and the model builder (`megaprune.mcore`) read it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megaprune.models.keys import ReadConfig, check_understood
from megaprune.models.layer_settings import prune_layer_settings
from megaprune.models.rope import RopeScaling
from megaprune.models.settings import HFConfig, flag
from megaprune.models.shards import COPY, GATED, ROW, VOCAB, ShardKind, SliceReader, TensorParallel
from megaprune.utils.errors import MegapruneError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class WeightRule:
    """One Megatron parameter and the HF tensors that it holds.

    Names may contain ``{layer}``, the global layer index from 0, and ``{expert}``, the global expert index. Under
    Transformer Engine's layer spec a parameter may have another name (``te``: norms are fused into the linear layer
    behind them, experts are grouped) or be cut otherwise (``te_shard``). Parameters of routed experts (``expert``) are
    cut over expert-tensor-parallel ranks. A rule with ``export=False`` is a second copy of tensors that another rule
    exports. A rule that is ``carried`` has no Megatron parameter: its tensor goes from the source to the export as it
    is.
    """

    megatron: str
    hf: tuple[str, ...]
    shard: ShardKind
    te: str | None = None
    te_shard: ShardKind | None = None
    expert: bool = False
    export: bool = True
    carried: bool = False

    def at(self, layer: int, expert: int = 0) -> WeightRule:
        """The rule of one layer, and of one of its experts."""
        return replace(
            self,
            megatron=self.megatron.format(layer=layer, expert=expert),
            hf=tuple(name.format(layer=layer, expert=expert) for name in self.hf),
            te=self.te and self.te.format(layer=layer, expert=expert),
        )

    def read(self, source: SliceReader, arch: Architecture, tp: TensorParallel) -> Tensor:
        """Read a rank's shard of the parameter, in the stored dtype.

        Raises:
            MegapruneError: a tensor is missing, or its shape can't be cut as the rule says.
        """
        return self.shard.read(source, self.hf, arch, tp)

    def merge(self, shards: Sequence[Tensor], arch: Architecture) -> dict[str, Tensor]:
        """Merge the shards of all tensor-parallel ranks, in order, into the HF tensors."""
        return dict(zip(self.hf, self.shard.merge(shards, arch), strict=True))


@dataclass(frozen=True)
class AttentionKind:
    """A kind of attention, with the HF shapes of its tensors.

    Args:
        shapes: dimensions, by name, of each tensor of a layer's attention; HF matrices are [out, in].
        dimensions: lengths of the dimensions that `shapes` names beside ``hidden``.
    """

    shapes: Mapping[str, tuple[str, ...]]
    dimensions: Callable[[Architecture], dict[str, int]]


@dataclass(frozen=True)
class QueryGrowth:
    """Growth of queries with their position p, by 1 + ``beta`` * ln(1 + floor(p / ``original_length``))."""

    beta: float
    original_length: int


# Keyword arguments of `TransformerConfig` with an entry per layer.
_PER_LAYER_FIELDS = ("moe_layer_freq", "no_rope_freq", "window_attn_skip_freq")


@dataclass(frozen=True)
class Architecture:
    """Model in Megatron-Core's terms.

    Args:
        transformer: keyword arguments of ``TransformerConfig``, or of ``MLATransformerConfig`` if `mla`.
        attention: the kind of attention, which declares the shapes of its tensors.
        vocab_size: rows of the embedding as stored by HF, before padding.
        max_position_embeddings: maximum number of positions.
        rotary_base: RoPE's theta.
        rope_scaling: scaling of RoPE, if any.
        rotary_dim: number of dimensions of a head that RoPE rotates; None means all.
        window_rope: theta and scaling of RoPE in layers with a sliding window, if they differ from the other layers'.
        query_growth: growth of queries with their position, if any.
        tied: whether the output layer shares the embedding's weight.
        pre_norm: whether attention and MLP are preceded by a norm.
        sandwich_norm: whether attention and MLP are also followed by a norm.
        qk_norm_over_width: whether a norm over all heads together follows the projections of query and key.
        output_bias: whether the attention's output projection, and with it query, key and value, has a bias.
        mlp_bias: whether the projections of MLPs, and with experts their router, have a bias.
        gelu: whether MLPs are gated by GELU, in its approximation by tanh, instead of SiLU.
        sigmoid_factor: MLPs are gated by x * sigmoid(factor * x), if not by SiLU, where it is 1, or GELU.
        zero_centered_norms: whether norms multiply by 1 + weight.
        embedding_factor: factor of the embedding's output, if any.
        attention_scale: factor of the attention scores, if it does not follow from the head dimension.
        longest_sequence: number of tokens up to which the model's sparse attention is dense, if it has any.
        index_heads, index_head_dim: heads, and their dimension, that choose what sparse attention attends to.
        latent_norm_epsilon: epsilon of the norms within latent attention, if it differs from that of the other norms.
        num_mtp: number of multi-token-prediction layers that are built; 0 unless they are trained.
    """

    transformer: dict[str, Any]
    attention: AttentionKind
    vocab_size: int
    max_position_embeddings: int
    rotary_base: float
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    window_rope: tuple[float, RopeScaling | None] | None = None
    query_growth: QueryGrowth | None = None
    tied: bool = False
    pre_norm: bool = True
    sandwich_norm: bool = False
    qk_norm_over_width: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gelu: bool = False
    sigmoid_factor: float = 1.0
    zero_centered_norms: bool = False
    embedding_factor: float | None = None
    attention_scale: float | None = None
    longest_sequence: int | None = None
    index_heads: int = 0
    index_head_dim: int = 0
    latent_norm_epsilon: float | None = None
    num_mtp: int = 0

    @property
    def mla(self) -> bool:
        """Return whether attention is multi-head latent attention."""
        return bool(self.transformer.get("multi_latent_attention"))

    @property
    def num_layers(self) -> int:
        return self.transformer["num_layers"]

    @property
    def query_groups(self) -> int:
        return self.transformer.get("num_query_groups") or self.transformer["num_attention_heads"]

    @property
    def num_experts(self) -> int:
        """Number of routed experts in each MoE layer; 0 for a dense model."""
        return self.transformer.get("num_moe_experts", 0)

    def is_moe(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return bool(self.num_experts and self.transformer["moe_layer_freq"][layer])

    def pruned(self, kept_layers: Sequence[int]) -> Architecture:
        """The architecture of these layers, in order."""
        fields = self.transformer | {"num_layers": len(kept_layers)}
        for name in _PER_LAYER_FIELDS:
            if name in fields:
                fields[name] = [self.transformer[name][layer] for layer in kept_layers]
        if not any(fields.get("no_rope_freq", ())):
            fields.pop("no_rope_freq", None)
        if any(fields.get("window_attn_skip_freq", ())):
            return replace(self, transformer=fields)
        for name in ("window_size", "window_attn_skip_freq"):
            fields.pop(name, None)
        return replace(self, transformer=fields, window_rope=None)

    @property
    def head_dim(self) -> int:
        return self.transformer["kv_channels"]


@dataclass(frozen=True)
class Family:
    """Everything that megaprune knows about one family of HF models.

    Args:
        model_type: ``model_type`` in config.json.
        describe: HF config to Megatron-Core's terms. Raises ``MegapruneError`` for what can't be expressed.
        model_rules: weights outside the layers.
        layer_rules: weights of one layer; rules with ``expert`` stand for each of its experts.
        prune_config: edits a copy of the HF config for the kept layers (source indices, ascending).
        ignored: regular expressions of stored tensors that no model reads.
        mtp_keys: names under which config.json counts multi-token-prediction layers, where the family has any.
        stacks_whole_experts: the tables name each expert's part of the stored stacks, with gate and up together.
        stacks_experts: transformers' class, where it has one, holds the experts of a layer as stacked parameters; the
            code that comes with other families, as a module each.
        modules_in_transformers: how names in transformers' class differ from those of the tensors: regular
            expressions, with what replaces them.
        prefix: what stored names have in front of the tables' names.
        passed: regular expressions of tensors of other parts of the model, which the export holds as they are.
        text_key: the key of config.json with the config of the language model, if it is nested.
        tied_by_default: whether embeddings are tied if config.json does not say it.
    """

    model_type: str
    describe: Callable[[HFConfig], Architecture]
    model_rules: Sequence[WeightRule]
    layer_rules: Callable[[Architecture, int], Sequence[WeightRule]]
    prune_config: Callable[[HFConfig, Sequence[int]], HFConfig] = prune_layer_settings
    ignored: tuple[str, ...] = ()
    mtp_keys: tuple[str, ...] = ()
    stacks_experts: bool = True
    stacks_whole_experts: bool = False
    modules_in_transformers: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    passed: tuple[str, ...] = ()
    text_key: str | None = None
    tied_by_default: bool = False

    def architecture(self, config: HFConfig) -> Architecture:
        """The architecture that an HF config describes.

        Raises:
            MegapruneError: the config asks for something that can't be expressed, or has a key that is not understood.
        """
        recorded = ReadConfig(config)
        arch = self.describe(recorded)
        recorded.read.update(self.mtp_keys)
        check_understood(recorded)
        return arch

    def ties(self, config: HFConfig) -> bool:
        """Return whether a config ties the embeddings."""
        return bool(config.get("tie_word_embeddings", self.tied_by_default))

    def with_mtp(self, config: HFConfig, number: int) -> HFConfig:
        """The config with another number of multi-token-prediction layers, where the family counts them."""
        if self.text_key is None:
            return config | dict.fromkeys(self.mtp_keys, number)
        return config | {self.text_key: config[self.text_key] | dict.fromkeys(self.mtp_keys, number)}

    def passes(self, name: str) -> bool:
        """Return whether a tensor belongs to another part of the model."""
        return any(re.search(pattern, name) for pattern in self.passed)

    def rules(self, config: HFConfig) -> list[WeightRule]:
        """Every rule of a model with this config, layer by layer."""
        arch = self.architecture(config)
        rules = [tied_output_rule(rule) if arch.tied else rule for rule in self.model_rules]
        for layer in range(arch.num_layers):
            for rule in self.layer_rules(arch, layer):
                rules += [rule.at(layer, expert) for expert in range(arch.num_experts if rule.expert else 1)]
        return rules


# Prefix of the checkpoint keys of HF tensors that no Megatron model reads. An export restores them.
CARRIED = "hf."
EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"

MODEL_RULES = (
    WeightRule("embedding.word_embeddings.weight", (EMBEDDING,), VOCAB),
    WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), COPY),
    WeightRule("output_layer.weight", (OUTPUT,), VOCAB),
)


def tied_output_rule(rule: WeightRule) -> WeightRule:
    """The output layer's rule under tied embeddings: the last pipeline stage holds a second copy of the embedding."""
    if rule.hf == (OUTPUT,):
        return replace(rule, hf=(EMBEDDING,), export=False)
    return rule


HF = "model.layers.{layer}."
MEGATRON = "decoder.layers.{layer}."
ATTENTION = MEGATRON + "self_attention."

MLP_RULES = (
    WeightRule(
        MEGATRON + "mlp.linear_fc1.weight",
        (HF + "mlp.gate_proj.weight", HF + "mlp.up_proj.weight"),
        GATED,
    ),
    WeightRule(MEGATRON + "mlp.linear_fc2.weight", (HF + "mlp.down_proj.weight",), ROW),
)

MLP_BIAS_RULES = (
    WeightRule(MEGATRON + "mlp.linear_fc1.bias", (HF + "mlp.gate_proj.bias", HF + "mlp.up_proj.bias"), GATED),
    WeightRule(MEGATRON + "mlp.linear_fc2.bias", (HF + "mlp.down_proj.bias",), COPY),
)


def expert_rules(block: str, gate: str, up: str, down: str) -> tuple[WeightRule, ...]:
    """The router and the routed experts.

    Args:
        block: HF name of the MLP with experts.
        gate, up, down: HF names of an expert's projections.
    """
    expert = HF + block + ".experts.{expert}."
    return (
        WeightRule(MEGATRON + "mlp.router.weight", (HF + block + ".gate.weight",), COPY),
        WeightRule(
            MEGATRON + "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            (f"{expert}{gate}.weight", f"{expert}{up}.weight"),
            GATED,
            te=MEGATRON + "mlp.experts.linear_fc1.weight{expert}",
            expert=True,
        ),
        WeightRule(
            MEGATRON + "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            (f"{expert}{down}.weight",),
            ROW,
            te=MEGATRON + "mlp.experts.linear_fc2.weight{expert}",
            expert=True,
        ),
    )


EXPERT_RULES = expert_rules("mlp", "gate_proj", "up_proj", "down_proj")


def carried_rule(name: str) -> WeightRule:
    """A tensor of a layer, named within it, that no Megatron parameter holds."""
    return WeightRule(CARRIED + HF + name, (HF + name,), COPY, carried=True)


def mlp_norm_rule(hf_norm: str, moe: bool) -> WeightRule:
    """The norm before the MLP, which Transformer Engine fuses into a dense MLP but not into experts."""
    return WeightRule(
        MEGATRON + "pre_mlp_layernorm.weight",
        (HF + hf_norm + ".weight",),
        COPY,
        te=None if moe else MEGATRON + "mlp.linear_fc1.layer_norm_weight",
    )


def refuse_attention_bias(config: HFConfig) -> None:
    """Refuse biases of the attention, which the family's Megatron layers have no place for.

    Raises:
        MegapruneError: config.json asks for them.
    """
    refuse_true(config, "attention_bias")


def refuse_true(config: HFConfig, key: str) -> None:
    """Check that a switch is off, or absent.

    Raises:
        MegapruneError: it is on.
    """
    if flag(config, key, False):
        raise MegapruneError(f"{config.get('model_type')}: {key} true is not supported")
