"""vLLM for the benchmark `inference`: two models in one process, and nothing kept from round to round."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megaprune import device
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line

# Both models are in memory at once, so that their rounds can alternate.
_SHARE_OF_GPU = 0.4
# vLLM's blocks of the KV cache are at most this long on a CPU; each prompt may leave one partly filled.
_BLOCK = 128
_LEAST_CACHE_BYTES = 1 << 26


def load(
    folder: Path, dtype: str, config: Any, batch_sizes: Sequence[int], lengths: Sequence[int]
) -> Callable[[torch.Tensor, int], None]:
    """Load a model, and return the function that continues prompts [b, s] by a number of tokens.

    Args:
        config: the model's, of transformers.
        batch_sizes: the numbers of prompts in a batch that will be measured.
        lengths: the numbers of tokens of a prompt and its continuation together.

    Raises:
        MegapruneError: vLLM can't load the model.
        UsageError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UsageError("--engine vllm: vLLM is not installed: install it, or use --engine transformers") from None
    settings: dict[str, Any] = dict(gpu_memory_utilization=_SHARE_OF_GPU)
    if device.torch_device().type == "cpu":  # where vLLM would take that share of the machine's memory for each model
        settings = dict(kv_cache_memory_bytes=cache_bytes(config, max(batch_sizes), max(lengths)))
    try:
        model = LLM(
            str(folder),
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=max(lengths),
            max_num_seqs=max(batch_sizes),
            # with it, the first token of a repeated prompt would cost nothing
            enable_prefix_caching=False,
            **settings,
        )
    except Exception as error:  # vLLM and its worker processes raise many kinds
        raise MegapruneError(f"{folder} can't be loaded by vLLM: {first_line(error)}") from error

    def generate(prompts: torch.Tensor, new_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts.tolist()]
        written = model.generate(given, sampling, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in written)

    return generate


def cache_bytes(config: Any, batch_size: int, length: int) -> int:
    """Return the bytes of a KV cache for a batch, in fp32, or a bound of it."""
    blocks = -(-length // _BLOCK) + 1
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = (getattr(config, "kv_lora_rank", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    per_token = 4 * max(2 * (getattr(config, "num_key_value_heads", None) or heads) * head_dim, latent)
    return max(_LEAST_CACHE_BYTES, batch_size * blocks * _BLOCK * config.num_hidden_layers * per_token)
