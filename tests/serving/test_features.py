"""Features of vLLM with an export: speculative decoding, adapters, prefix caching."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megaprune
from tests.helpers import mtp, tiny
from tests.serving import models
from tests.serving.engine import TIE, ask, difference, engine, prompts

pytestmark = pytest.mark.serving

ROOT = Path(__file__).parents[2]


def counters(model):
    """Return vLLM's counters by name."""
    return {metric.name: metric.value for metric in model.get_metrics() if hasattr(metric, "value")}


def test_the_exported_mtp_layer_drives_speculative_decoding(tmp_path):
    source = mtp.make_model(tmp_path / "source", **models.LATENT, **models.EXPERTS)
    megaprune.remove_layers(source, layers=[1, 3], save=tmp_path / "pruned")
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    with engine(tmp_path / "pruned", speculative_config=speculative, disable_log_stats=False) as model:
        answers, counted = ask(model, prompts()), counters(model)
    found = difference(tmp_path / "pruned", prompts(), answers, mtp.Reference(source, [0, 2, 4]).model)
    assert found.same_tokens and found.logprob <= TIE
    assert counted["vllm:spec_decode_num_draft_tokens"] > 0


def test_an_export_without_its_mtp_layer_is_served(tmp_path):
    source = mtp.make_model(tmp_path / "source", **models.LATENT, **models.EXPERTS)
    megaprune.remove_layers(source, layers=[1, 3], save=tmp_path / "pruned", mtp="drop")
    with engine(tmp_path / "pruned") as model:
        answers = ask(model, prompts())
    assert difference(tmp_path / "pruned", prompts(), answers).same_tokens


def test_the_exported_adapter_is_served(tiny_data, tmp_path):
    from peft import AutoPeftModelForCausalLM
    from vllm.lora.request import LoRARequest

    source = models.make_model(tmp_path / "source", "qwen3")
    # in a process of its own, because vLLM has process groups too
    extra = ["--lora-rank", "8", "--export-adapter", "--lr", "0.02"]
    argv = tiny.prune_argv(source, tiny_data, tmp_path / "run", *extra)
    subprocess.run([sys.executable, str(ROOT / "tools" / "prune.py"), *argv], check=True, cwd=ROOT)
    hf, adapter = tmp_path / "run" / "hf", tmp_path / "run" / "adapter"
    with engine(hf, enable_lora=True, max_lora_rank=8) as model:
        answers = ask(model, prompts(), lora_request=LoRARequest("adapter", 1, str(adapter)))
        plain = ask(model, prompts())
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    found = difference(hf, prompts(), answers, tuned)
    assert found.same_tokens and found.logprob <= TIE
    assert difference(hf, prompts(), plain).logprob <= TIE
    assert difference(hf, prompts(), answers).logprob > 0.01, "the adapter changes nothing"


def test_a_cached_prefix_changes_nothing(tmp_path):
    source = models.make_model(tmp_path / "source", "llama2")
    megaprune.remove_layers(source, layers=[1, 3], save=tmp_path / "pruned")
    with engine(tmp_path / "pruned", enable_prefix_caching=True, block_size=32) as model:
        first = ask(model, prompts())
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, max_tokens=len(first.tokens[0]), ignore_eos=True, detokenize=False)
        [again] = model.generate([{"prompt_token_ids": prompts()[0]}], sampling, use_tqdm=False)
    assert again.num_cached_tokens >= 32
    assert list(again.outputs[0].token_ids) == first.tokens[0]
