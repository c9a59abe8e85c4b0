"""Specs of the layers of a model: Megatron-Core's, with this package's modules in the places that need them."""

import copy

from megatron.core.extensions.transformer_engine import TEColumnParallelLinear
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megaprune.mcore.layers.attention import AttentionVariant, KeyNormOverHeads, QueryNormOverHeads, VariantAttention
from megaprune.mcore.layers.gated import GatedTransformerLayer
from megaprune.mcore.layers.local import LatentAttention, RMSNorm, ScaledDotProductAttention
from megaprune.mcore.layers.multi_token import mtp_spec
from megaprune.mcore.layers.sandwich import GatedSandwichTransformerLayer, SandwichTransformerLayer
from megaprune.mcore.rotary import window_scale
from megaprune.models import Architecture

# (gated, sandwich norms) -> layer class
_LAYERS = {
    (False, False): TransformerLayer,
    (False, True): SandwichTransformerLayer,
    (True, False): GatedTransformerLayer,
    (True, True): GatedSandwichTransformerLayer,
}


def block_spec(
    arch: Architecture, config: TransformerConfig, transformer_engine: bool, gated: bool
) -> TransformerBlockSubmodules:
    """Return the spec of all layers.

    Args:
        arch: architecture of the model.
        config: the model's configuration.
        transformer_engine: whether layers are Transformer Engine's.
        gated: whether layers have a gate.
    """
    spec = get_gpt_decoder_block_spec(config, transformer_engine, normalization="RMSNorm")
    spec = copy.deepcopy(spec)  # the core uses the same spec object for all layers
    for layer in spec.layer_specs:
        layer.module = _LAYERS[gated, arch.sandwich_norm]
        if not transformer_engine:
            _use_local_modules(layer.submodules, config)
        if not arch.mla:
            _use_variant(layer.submodules, arch)
        if not arch.pre_norm:
            _remove_pre_norms(layer.submodules, transformer_engine)
    if not transformer_engine:
        spec.layer_norm = RMSNorm
    return spec


def mtp_block_spec(
    arch: Architecture, config: TransformerConfig, transformer_engine: bool
) -> MultiTokenPredictionBlockSubmodules | None:
    """Return the spec of the MTP layers, which have experts if the model has any, even if no kept layer does."""
    if not arch.num_mtp:
        return None
    last = copy.copy(config)
    if arch.num_experts:
        last.moe_layer_freq = [1] * arch.num_layers
    # One layer is enough, and it must be there on a stage without layers, too.
    last.pipeline_model_parallel_size, last.pipeline_model_parallel_layout = 1, None
    return mtp_spec(config, block_spec(arch, last, transformer_engine, gated=False), transformer_engine)


def _use_local_modules(parts: TransformerLayerSubmodules, config: TransformerConfig) -> None:
    attention = parts.self_attention.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention.core_attention = ScaledDotProductAttention
    if config.multi_latent_attention:
        parts.self_attention.module = LatentAttention
        attention.q_layernorm = attention.kv_layernorm = RMSNorm
    elif config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm


def _use_variant(parts: TransformerLayerSubmodules, arch: Architecture) -> None:
    """Replace the grouped-query attention where the architecture's differs from the core's."""
    scale = window_scale(arch)
    variant = AttentionVariant(arch.output_bias, scale, arch.query_growth)
    if arch.qk_norm_over_width:
        parts.self_attention.submodules.q_layernorm = QueryNormOverHeads
        parts.self_attention.submodules.k_layernorm = KeyNormOverHeads
    # the configuration of the model asks for the biases of MLPs in all layers
    if variant != AttentionVariant() or arch.window_rope is not None or arch.mlp_bias:
        parts.self_attention.module = VariantAttention
        parts.self_attention.params = {**parts.self_attention.params, "variant": variant}


def _remove_pre_norms(parts: TransformerLayerSubmodules, transformer_engine: bool) -> None:
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    if transformer_engine:  # whose layers fuse these norms into the projections
        parts.self_attention.submodules.linear_qkv = TEColumnParallelLinear
        parts.mlp.submodules.linear_fc1 = TEColumnParallelLinear
