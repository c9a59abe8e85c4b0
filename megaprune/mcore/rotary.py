"""RoPE in Megatron-Core's modules with transformers' frequencies and factor on cosine and sine."""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megaprune.mcore.layers.multi_token import layer_within
from megaprune.models import Architecture, RopeScaling


def inverse_frequencies(theta: float, dim: int, scaling: RopeScaling | None) -> Tensor:
    """Return the inverse frequencies [dim / 2] in fp32 on the CPU.

    Args:
        theta: base of the frequencies.
        dim: number of rotated dimensions.
        scaling: RoPE scaling of the architecture; None means unscaled.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain
    if scaling.rope_type == "linear":
        return plain / scaling.factor
    if scaling.rope_type == "llama3":
        return _by_wavelength(plain, scaling)
    return _by_ramp(plain, theta, dim, scaling)


def _by_wavelength(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Scale as in LLaMA 3.1: stretch long wavelengths, keep short ones and interpolate between them."""
    length, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    assert length is not None and low is not None and high is not None  # every llama3 scaling has them
    wavelength = 2 * math.pi / plain
    kept_share = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept_share) * plain / scaling.factor + kept_share * plain


def _by_ramp(plain: Tensor, theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """Scale as in YaRN: keep low dimensions, stretch high ones and interpolate linearly between them.

    Both ends of the ramp are given by the number of rotations within the original context length.
    """
    length, fast, slow = scaling.original_max_position_embeddings, scaling.beta_fast, scaling.beta_slow
    assert length is not None and fast is not None and slow is not None  # every yarn scaling has them

    def dimension(rotations: float) -> float:
        """Return the dimension that makes this number of rotations within the original length."""
        turns = length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    first, last = dimension(fast), dimension(slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    stretched_share = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return plain / scaling.factor * stretched_share + plain * (1 - stretched_share)


class ScaledRotaryEmbedding(YarnRotaryEmbedding):
    """The core's YaRN module for latent attention, with transformers' frequencies and factor on cosine and sine.

    The core always derives the factor from two mscales, always rounds the ends of the ramp, and has another default for
    a missing mscale than transformers.
    """

    def __init__(self, theta: float, dim: int, scaling: RopeScaling) -> None:
        # Must precede the core's constructor, which calls get_emb.
        self.frequencies, self.factor = inverse_frequencies(theta, dim, scaling), scaling.attention_factor
        super().__init__(dim, rotary_base=theta, original_max_position_embeddings=1)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, float]:
        """Return the angles [s, 1, 1, dim] and the factor on cosine and sine."""
        device = self.inv_freq_extra.device
        positions = torch.arange(max_seq_len, device=device, dtype=torch.float32) + offset
        angles = torch.outer(positions, self.frequencies.to(device))
        return torch.cat((angles, angles), dim=-1)[:, None, None, :], self.factor


def softmax_scale(arch: Architecture) -> float | None:
    """Return the factor of attention scores in grouped-query attention, or None for the core's default."""
    return None if arch.mla else _scale(arch, arch.rope_scaling)


def window_scale(arch: Architecture) -> float | None:
    """Return the factor of attention scores in layers with a sliding window, or None if it is that of other layers."""
    if arch.window_rope is None or _scale(arch, arch.window_rope[1]) == _scale(arch, arch.rope_scaling):
        return None
    return _scale(arch, arch.window_rope[1]) or 1 / math.sqrt(arch.head_dim)


def _scale(arch: Architecture, scaling: RopeScaling | None) -> float | None:
    # The factor on cosine and sine multiplies the scores twice: all dimensions of queries and keys are rotated.
    if arch.attention_scale is not None:
        return arch.attention_scale
    if scaling is None or scaling.attention_factor == 1:
        return None
    return scaling.attention_factor**2 / math.sqrt(arch.head_dim)


def attending_layers(model: GPTModel) -> list[TransformerLayer]:
    """Return the transformer layers of a built model, including those of MTP layers."""
    ahead = [layer_within(layer) for layer in model.mtp.layers] if model.mtp_process else []
    return [*model.decoder.layers, *ahead]


def scale_rope(model: GPTModel, arch: Architecture) -> None:
    """Set the architecture's scaled RoPE in a built model."""
    scaling = arch.rope_scaling
    if not arch.mla:
        _scale_shared_rope(model, arch)
        return
    if scaling is None:
        return
    dim, attentions = (
        arch.transformer["qk_pos_emb_head_dim"],
        [layer.self_attention for layer in attending_layers(model)],
    )
    if scaling.rope_type == "yarn":
        shared = ScaledRotaryEmbedding(arch.rotary_base, dim, scaling) if attentions else None
        for attention in attentions:
            attention.rotary_pos_emb = shared
        return
    for attention in attentions:
        _set_frequencies(attention.rotary_pos_emb, inverse_frequencies(arch.rotary_base, dim, scaling))


def _scale_shared_rope(model: GPTModel, arch: Architecture) -> None:
    """Set RoPE of grouped-query attention: one module for all layers, and one for those with a sliding window."""
    if arch.rope_scaling is not None or arch.rotary_dim is not None:
        dim = arch.rotary_dim or arch.head_dim
        _set_frequencies(model.rotary_pos_emb, inverse_frequencies(arch.rotary_base, dim, arch.rope_scaling))
    if arch.window_rope is None:
        return
    theta, scaling = arch.window_rope
    rope = RotaryEmbedding(arch.head_dim, 1.0)
    _set_frequencies(rope, inverse_frequencies(theta, arch.head_dim, scaling))
    for layer in attending_layers(model):
        if layer.self_attention.has_window:
            layer.self_attention.window_rope = rope


def _set_frequencies(rope: RotaryEmbedding, frequencies: Tensor) -> None:
    rope.inv_freq = frequencies.to(rope.inv_freq.device)
