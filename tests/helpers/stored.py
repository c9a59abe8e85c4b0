"""Models in stored layouts that differ from their families' tables, as transformers or users save them."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

from tests.helpers import tiny

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def stacked(model: Path, out: Path, max_shard_size: str = "5GB") -> Path:
    """Store the experts of a layer in two tensors."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(out, save_original_format=False, max_shard_size=max_shard_size)
    return _with_tokenizer(model, out)


def bare(model: Path, out: Path) -> Path:
    """Store a base model, whose names lack ``model.``."""
    AutoModel.from_pretrained(model).save_pretrained(out, max_shard_size="200KB")
    return _with_tokenizer(model, out)


def untied(model: Path, out: Path) -> Path:
    """Store a different output layer beside embeddings that config.json ties."""

    def edit(tensors):
        generator = torch.Generator().manual_seed(11)
        tensors[OUTPUT] = 0.3 * torch.randn(tensors[EMBEDDING].shape, generator=generator).to(tensors[EMBEDDING].dtype)

    return edited(model, out, edit)


def twice(model: Path, out: Path) -> Path:
    """Store tied embeddings under both names."""
    return edited(model, out, lambda tensors: tensors.update({OUTPUT: tensors[EMBEDDING].clone()}))


def as_output(model: Path, out: Path) -> Path:
    """Store tied embeddings only as the output layer."""
    return edited(model, out, lambda tensors: tensors.update({OUTPUT: tensors.pop(EMBEDDING)}))


def edited(model: Path, out: Path, edit) -> Path:
    """Return a copy with other tensors, in one file."""
    tensors = tiny.read_tensors(model)
    edit(tensors)
    out.mkdir(parents=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model / "config.json", out)
    return _with_tokenizer(model, out)


# Name: the original model, and the function that stores it.
MODELS = {
    "qwen3_moe_stacked": ("qwen3_moe", stacked),
    "deepseek_v3_stacked": ("deepseek_v3", stacked),
    "qwen3_tied_bare": ("qwen3_tied", bare),
    "qwen3_tied_untied": ("qwen3_tied", untied),
    "llama_tied_twice": ("llama_tied", twice),
    "qwen2_as_output": ("qwen2", as_output),
}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def _with_tokenizer(model: Path, out: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        if (model / name).exists():
            shutil.copy(model / name, out)
    return out
