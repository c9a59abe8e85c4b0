"""Engines that continue batches of prompts: transformers with a batched KV cache, and vLLM."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megaprune import device
from megaprune.evaluation.perplexity import load_model, resolve_dtype
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line

VLLM, TRANSFORMERS = "vllm", "transformers"
BATCH_SIZES = {VLLM: 512, TRANSFORMERS: 32}


@dataclass(frozen=True)
class Sampling:
    """The choice of each next token.

    Args:
        temperature: 0 takes the most probable token.
        top_p: the probability of the tokens that are sampled from.
        max_new_tokens: the limit for each prompt.
        num_tokens: only ids below this are written; a model may have more rows in its embedding than there are tokens.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    num_tokens: int


@dataclass(frozen=True)
class Completion:
    """The tokens that follow a prompt, without the one that ended them.

    Args:
        ended: False if they were cut at the limit.
    """

    tokens: list[int]
    ended: bool


class Engine(Protocol):
    """A loaded model that continues prompts."""

    def complete(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], stops: frozenset[int]
    ) -> list[Completion]:
        """Continue each prompt until one of the `stops`, by random numbers that follow from its own seed."""


def resolve_engine(name: str) -> str:
    """Return the engine that `--engine` names.

    Raises:
        UsageError: it is not installed.
    """
    installed = importlib.util.find_spec("vllm") is not None
    if name == "auto":
        return VLLM if installed and device.torch_device().type == "cuda" else TRANSFORMERS
    if name == VLLM and not installed:
        raise UsageError("--engine vllm: vLLM is not installed: install it, or use --engine transformers")
    return name


def load_engine(name: str, folder: Path, bf16: bool, sampling: Sampling, trust_remote_code: bool) -> Engine:
    """Load a model into an engine.

    Args:
        name: a result of `resolve_engine`.

    Raises:
        MegapruneError: the engine can't load the model.
    """
    make = VLLMEngine if name == VLLM else TransformersEngine
    return make(folder, bf16, sampling, trust_remote_code)


class TransformersEngine:
    def __init__(self, folder: Path, bf16: bool, sampling: Sampling, trust_remote_code: bool) -> None:
        where = device.torch_device()
        dtype = resolve_dtype("bf16" if bf16 else "auto", where)
        self._model = load_model("--hf-model", str(folder), dtype, where, trust_remote_code)
        self._sampling = sampling

    @torch.inference_mode()
    def complete(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], stops: frozenset[int]
    ) -> list[Completion]:
        from transformers import GenerationConfig

        width, pad = max(map(len, prompts)), min(stops, default=0)
        # Padded on the left, so that the next token of every prompt is in the same column.
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # The model's own settings, such as a repetition penalty, would change what the student learns to imitate.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=self._sampling.max_new_tokens,
            do_sample=False,  # the processor leaves only the token that it chose
            eos_token_id=sorted(stops) or None,
            pad_token_id=pad,
        )
        written = self._model.generate(
            ids.to(self._model.device),
            attention_mask=mask.to(self._model.device),
            logits_processor=[TokenChoice(self._sampling, seeds)],
        )
        return [_until_stop(row, stops) for row in written[:, width:].tolist()]


class TokenChoice:
    """Logits processor that leaves one token for each row, chosen by the row's own random numbers."""

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        self._sampling = sampling
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [b, v] of which all but the chosen ones are minus infinity."""
        scores = scores.float()
        if not bool(torch.isfinite(scores).any(dim=-1).all()):
            raise MegapruneError("--hf-model: its logits aren't finite; its weights are damaged, or try without --bf16")
        scores[:, self._sampling.num_tokens :] = -torch.inf
        if self._sampling.temperature == 0:
            return scores
        draws = torch.stack([torch.rand((), generator=generator) for generator in self._generators])
        chosen = _by_draw(scores / self._sampling.temperature, self._sampling.top_p, draws.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


def _by_draw(scores: torch.Tensor, top_p: float, draws: torch.Tensor) -> torch.Tensor:
    """Return the token [b, 1] of each row of scores [b, v] at which the distribution function passes the draw [b]."""
    probs, order = scores.softmax(dim=-1), None
    if top_p < 1:
        probs, order = probs.sort(dim=-1, descending=True, stable=True)
        # A token stays if those before it have less than top_p; the first one always does.
        probs = torch.where(probs.cumsum(dim=-1) - probs < top_p, probs, 0.0)
    reached = probs.cumsum(dim=-1)
    total = reached[:, -1:]
    # Below the total even when the product rounds up, so that no token of probability 0 is taken.
    threshold = torch.minimum(draws[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(reached, threshold, right=True)
    return place if order is None else order.gather(1, place)


class VLLMEngine:
    def __init__(self, folder: Path, bf16: bool, sampling: Sampling, trust_remote_code: bool) -> None:
        from vllm import LLM

        dtype = "bfloat16" if bf16 else "auto"
        try:
            self._model: Any = LLM(
                str(folder), dtype=dtype, skip_tokenizer_init=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # vLLM and its worker processes raise many kinds
            raise MegapruneError(
                f"--hf-model {folder} can't be loaded by vLLM ({first_line(error)}): try --engine transformers"
            ) from error
        self._sampling = sampling

    def complete(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], stops: frozenset[int]
    ) -> list[Completion]:
        from vllm import SamplingParams

        given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        vocab_size = self._model.llm_engine.model_config.get_vocab_size()
        limited = self._sampling.num_tokens < vocab_size
        params = [
            SamplingParams(
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                max_tokens=self._sampling.max_new_tokens,
                seed=seed,
                stop_token_ids=sorted(stops),
                allowed_token_ids=list(range(self._sampling.num_tokens)) if limited else None,
                detokenize=False,
            )
            for seed in seeds
        ]
        written = self._model.generate(given, params, use_tqdm=False)
        return [_until_stop(list(output.outputs[0].token_ids), stops) for output in written]


def _until_stop(tokens: list[int], stops: frozenset[int]) -> Completion:
    end = next((place for place, token in enumerate(tokens) if token in stops), None)
    return Completion(tokens[:end], ended=end is not None)
