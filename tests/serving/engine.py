"""vLLM in this process, and the models of transformers that its answers are compared with."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.helpers import tiny

NEW_TOKENS = 12
# Greedy tokens may differ where two are this close in log-probability.
TIE = 1e-4
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Answers:
    """The greedy continuation of each prompt, and the log-probabilities of the prompt's tokens from the second on."""

    tokens: list[list[int]]
    logprobs: list[list[float]]


@dataclass(frozen=True)
class Difference:
    """Difference of vLLM from transformers: the largest one of the prompts' log-probabilities, and how far below the
    best token the worst of vLLM's tokens is.
    """

    logprob: float
    token_gap: float

    @property
    def same_tokens(self) -> bool:
        """Return whether every token of vLLM's is the best one, or ties with it."""
        return self.token_gap <= TIE


def prompts() -> list[list[int]]:
    """Return prompts of several lengths, one beyond the original context of tiny RoPE scalings."""
    tokens = tiny.random_tokens().tolist()
    return [tokens[0], tokens[1][:17], tokens[1][20:60]]


@contextmanager
def engine(folder: Path, **options: Any) -> Iterator[Any]:
    """Load a model into vLLM, in fp32."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = dict(dtype="float32", enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=True)
    settings |= dict(max_model_len=160, max_num_seqs=4, kv_cache_memory_bytes=1 << 26, trust_remote_code=True)
    model = LLM(str(folder), **(settings | options))
    try:
        yield model
    finally:
        model.llm_engine.engine_core.shutdown()
        del model
        gc.collect()
        cleanup_dist_env_and_memory()


def ask(model: Any, asked: Prompts, new_tokens: int = NEW_TOKENS, **request: Any) -> Answers:
    """Let vLLM continue the prompts greedily."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, prompt_logprobs=0, detokenize=False)
    sampling.ignore_eos = True
    outputs = model.generate(
        [{"prompt_token_ids": list(prompt)} for prompt in asked], sampling, use_tqdm=False, **request
    )
    logprobs = [
        [found[token].logprob for token, found in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
        for prompt, output in zip(asked, outputs, strict=True)
    ]
    return Answers([list(output.outputs[0].token_ids) for output in outputs], logprobs)


def difference(folder: Path, asked: Prompts, answers: Answers, model: torch.nn.Module | None = None) -> Difference:
    """Compare answers with transformers, or with openPangu's reference.

    Args:
        model: in place of the one in the folder.
    """
    largest = gap = 0.0
    for prompt, tokens, logprobs in zip(asked, answers.tokens, answers.logprobs, strict=True):
        row = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logits = tiny.hf_logits(folder, row) if model is None else model(row).logits
        ours = logits[0].float().log_softmax(-1)
        largest = max(largest, _largest(ours[: len(prompt) - 1], prompt[1:], logprobs))
        written = ours[len(prompt) - 1 : -1]
        best = written.max(-1).values
        gap = max(gap, float((best - written.gather(1, torch.tensor(tokens)[:, None])[:, 0]).max()))
    return Difference(largest, gap)


def _largest(ours: Tensor, tokens: Sequence[int], theirs: Sequence[float]) -> float:
    expected = ours.gather(1, torch.tensor(list(tokens))[:, None])[:, 0]
    return float((expected - torch.tensor(theirs)).abs().max())
