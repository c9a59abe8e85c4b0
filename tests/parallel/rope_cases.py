"""Models with every accepted form of RoPE: their configs, and their logits at a layout."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megaprune.mcore import parallel, schedule
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_layout import balanced_stages
from megaprune.models.sizes import layer_costs, output_cost
from megaprune.weights.source import HFSource
from tests.helpers import pangu, tiny
from tests.parallel.cases import whole_vocabulary

# Sequences are three times as long, so that positions within and beyond it are computed.
_LENGTH = {"original_max_position_embeddings": 32}
_YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0} | _LENGTH
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | _LENGTH
_LINEAR = {"type": "linear", "factor": 4.0}
_NEW = {"rope_type": "default", "rope_theta": 5e5}
_TP2_SP, _PP2, _EP2 = {"tensor": 2, "sequence_parallel": True}, {"pipeline": 2}, {"expert": 2}
# by name: the family of the weights, RoPE's settings in config.json, a layout of two processes
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "default": ("llama2", {"rope_theta": 2e4}, _TP2_SP),
    "default_new": ("qwen2", {"rope_parameters": _NEW}, _PP2),
    "linear": ("llama2", {"rope_theta": 2e4, "rope_scaling": _LINEAR}, _PP2),
    "linear_beside_new": ("qwen3", {"rope_scaling": _LINEAR, "rope_parameters": _NEW}, _TP2_SP),
    "llama3": ("llama3", {"rope_theta": 5e5, "rope_scaling": _LLAMA3}, _TP2_SP),
    # as DeepSeek-R1-0528-Qwen3-8B has it
    "yarn": ("qwen3", {"rope_theta": 1e4, "rope_scaling": _YARN | {"attn_factor": 0.8782488562869419}}, _TP2_SP),
    "yarn_new": ("llama2", {"rope_parameters": _YARN | {"rope_theta": 1e4, "attention_factor": 1.4}}, _PP2),
    "yarn_mscales": ("qwen2", {"rope_scaling": _YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}, _TP2_SP),
    "yarn_experts": ("qwen3_moe", {"rope_scaling": _YARN | {"factor": None, "truncate": False}}, _EP2),
    # an epsilon that shows: the norms of the latents keep theirs
    "latent_default": ("deepseek_v3", {"rope_theta": 2e4, "rope_interleave": True, "rms_norm_eps": 1e-2}, _EP2),
    "latent_linear": ("deepseek_v3", {"rope_scaling": _LINEAR}, _PP2),
    "latent_llama3": ("deepseek_v3", {"rope_scaling": _LLAMA3}, _TP2_SP),
    "latent_yarn": ("deepseek_v3", {"rope_scaling": _YARN | {"mscale": 2.0, "mscale_all_dim": 1.0}}, _TP2_SP),
    "latent_yarn_temperature": ("deepseek_v3", {"rope_scaling": _YARN | {"mscale_all_dim": 1.0}}, _EP2),
    "latent_yarn_factor": ("deepseek_v3", {"rope_scaling": _YARN | {"attention_factor": 1.4, "truncate": False}}, _PP2),
}

_OTHER = {key: value for key, value in pangu.CONFIG.items() if key not in ("rope_theta", "sandwich_norm")}
_BIAS = {"router_enable_expert_bias": True}
# openPangu's configs, and a layout of two processes; its RoPE is not scaled
PANGU: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pangu_new_spelling": (_OTHER | {"sandwich_norm": True, "rope_parameters": _NEW}, _TP2_SP),
    "pangu_expert_bias": (pangu.CONFIG | _BIAS, _EP2),
    "pangu_without_sandwich": (_OTHER | _BIAS | {"rope_theta": 2.56e7}, _PP2),
}


def make_model(folder: Path, weights: Path, settings: dict[str, Any]) -> Path:
    """Save a model with the weights of another model and these RoPE settings."""
    shutil.copytree(weights, folder)
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("rope_")} | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(hf_model: str, sizes: dict[str, Any], out: str) -> None:
    """Compute a model's logits in fp32, ``out/fp32.pt``, and in bf16, ``out/bf16.pt``."""
    sizes, source, folder = ParallelSizes(**sizes), HFSource(hf_model), Path(out)
    arch = source.family.architecture(source.config)
    parallel.initialize(sizes)
    if parallel.rank() == 0:
        folder.mkdir(parents=True)
    stages = balanced_stages(layer_costs(source.config), sizes.pipeline, output_cost(source.config))
    batch = tiny.make_batch(tiny.random_tokens())
    for name, bf16 in (("fp32", False), ("bf16", True)):
        options = EngineOptions(sizes, bf16=bf16)
        built = build_model(arch, stages, options)
        import_weights(built, source)
        for found in schedule.forward(in_half_precision(built, options), [batch], whole_vocabulary):
            if parallel.tensor_parallel().rank == parallel.data_parallel_rank() == 0:
                torch.save(found.float().transpose(0, 1)[..., : arch.vocab_size].contiguous(), folder / f"{name}.pt")
    parallel.finish()
