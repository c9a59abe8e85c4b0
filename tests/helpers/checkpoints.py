"""HF folders of a few kilobytes, made from a config."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megaprune.models import family_of
from megaprune.models.shapes import hf_shapes

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True}


def random_tensors(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return every tensor of a model with this config, with random values."""
    family = family_of(config)
    names = [name for rule in family.rules(config) if rule.export for name in rule.hf]
    generator = torch.Generator().manual_seed(3)
    shapes = hf_shapes(names, family.architecture(config))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_folder(
    folder: Path, config: dict, tensors: dict[str, torch.Tensor] | None = None, num_files: int = 1
) -> dict[str, torch.Tensor]:
    """Write config.json and the tensors, in one file or in several with an index. Return the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors")
        return tensors
    weight_map = {}
    for number in range(num_files):
        file = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        part = dict(list(tensors.items())[number::num_files])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return tensors


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def layers_in_config(number: int) -> dict:
    """Return settings that agree on a number of layers, which may differ from that of the weights."""
    return {"num_hidden_layers": number, "layer_types": ["full_attention"] * number}
