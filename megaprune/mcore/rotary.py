"""RoPE as transformers computes it, in Megatron-Core's modules: frequencies, the factor on cosine and sine."""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import YarnRotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megaprune.models import Architecture, RopeScaling


def inverse_frequencies(theta: float, dim: int, scaling: RopeScaling | None) -> Tensor:
    """The inverse frequencies [dim / 2] in fp32, on the CPU."""
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
    """LLaMA 3.1's: long waves are stretched, short ones kept, those between are interpolated."""
    length, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    wavelength = 2 * math.pi / plain
    kept_share = ((length / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - kept_share) * plain / scaling.factor + kept_share * plain


def _by_ramp(plain: Tensor, theta: float, dim: int, scaling: RopeScaling) -> Tensor:
    """YaRN's: between two dimensions, given by rotations within the original length, a linear ramp."""

    def dimension(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    stretched_share = ((torch.arange(dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return plain / scaling.factor * stretched_share + plain * (1 - stretched_share)


class ScaledRotaryEmbedding(YarnRotaryEmbedding):
    """The core's YaRN module for latent attention, with frequencies and a factor on cosine and sine of our own.

    The core's always derives the factor from its two mscales, always rounds the ramp, and takes a missing mscale for
    another number than transformers.
    """

    def __init__(self, theta: float, dim: int, scaling: RopeScaling) -> None:
        # before the core's constructor, which fills its cache
        self.frequencies, self.factor = inverse_frequencies(theta, dim, scaling), scaling.attention_factor
        super().__init__(dim, rotary_base=theta, original_max_position_embeddings=1)

    def get_emb(self, max_seq_len: int, offset: int = 0) -> tuple[Tensor, float]:
        """Angles [s, 1, 1, dim], and the factor."""
        device = self.inv_freq_extra.device
        positions = torch.arange(max_seq_len, device=device, dtype=torch.float32) + offset
        angles = torch.outer(positions, self.frequencies.to(device))
        return torch.cat((angles, angles), dim=-1)[:, None, None, :], self.factor


def softmax_scale(arch: Architecture) -> float | None:
    """The scale of attention scores in grouped-query attention, whose queries and keys rotate as a whole: the factor
    on cosine and sine multiplies the scores twice. None for the core's own."""
    if arch.mla or arch.rope_scaling is None or arch.rope_scaling.attention_factor == 1:
        return None
    return arch.rope_scaling.attention_factor**2 / math.sqrt(arch.head_dim)


def scale_rope(model: GPTModel, arch: Architecture) -> None:
    """Gives a built model the architecture's scaled RoPE."""
    scaling = arch.rope_scaling
    if scaling is None:
        return
    if not arch.mla:
        _set_frequencies(model.rotary_pos_emb, inverse_frequencies(arch.rotary_base, arch.head_dim, scaling))
        return
    dim, attentions = arch.transformer["qk_pos_emb_head_dim"], [x.self_attention for x in model.decoder.layers]
    if scaling.rope_type == "yarn":
        shared = ScaledRotaryEmbedding(arch.rotary_base, dim, scaling) if attentions else None
        for attention in attentions:
            attention.rotary_pos_emb = shared
        return
    for attention in attentions:
        _set_frequencies(attention.rotary_pos_emb, inverse_frequencies(arch.rotary_base, dim, scaling))


def _set_frequencies(rope: RotaryEmbedding, frequencies: Tensor) -> None:
    rope.inv_freq = frequencies.to(rope.inv_freq.device)
