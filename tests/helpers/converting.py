"""Helpers of the conversion tests: the verb, and models to convert."""

import json

import torch
from safetensors.torch import save_file

from megaprune.cli import main as cli
from megaprune.models.shapes import hf_shapes
from megaprune.weights.source import HFSource
from tests.helpers import tiny

KEY = "model.layers.1.mlp.up_proj.weight"


def convert(*words):
    """Run the verb in this process; return its exit status and its error line."""
    return cli.attempt("convert", [str(word) for word in words])


def done(*words):
    assert convert(*words) == (0, None)


def through_megatron(model, folder):
    """Import a model and export it again within a folder; return its tensors."""
    done("import", "--hf-model", model, "--megatron-path", folder / "megatron")
    done("export", "--megatron-path", folder / "megatron", "--hf-path", folder / "hf")
    return tiny.read_tensors(folder / "hf")


def write(out, config, tensors):
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def edited(model, out, edit, config=None):
    """Return a copy of a model with other tensors."""
    tensors = tiny.read_tensors(model)
    edit(tensors)
    return write(out, json.loads((model / "config.json").read_text()) | (config or {}), tensors)


def with_mtp(folder, out):
    """Return a DeepSeek model with a multi-token-prediction layer and its copies of embedding and output layer."""
    source = HFSource(folder)
    arch = source.family.architecture(source.config)
    last, extra = arch.num_layers - 1, arch.num_layers
    generator = torch.Generator().manual_seed(1)
    tensors = tiny.read_tensors(folder)
    names = [name for name in tensors if name.startswith(f"model.layers.{last}.")]
    shapes = hf_shapes(names, arch)
    own = {name.replace(f".{last}.", f".{extra}.", 1): shape for name, shape in shapes.items()}
    hidden = source.config["hidden_size"]
    prefix = f"model.layers.{extra}."
    own |= {prefix + name: (hidden,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    own[prefix + "eh_proj.weight"] = (hidden, 2 * hidden)
    tensors |= {name: torch.randn(shape, generator=generator) for name, shape in own.items()}
    tensors[prefix + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[prefix + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return write(out, source.config | {"num_nextn_predict_layers": 1}, tensors)


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def assert_same_model(folder, other):
    tensors, expected = tiny.read_tensors(folder), tiny.read_tensors(other)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    assert json.loads((folder / "config.json").read_text()) == json.loads((other / "config.json").read_text())


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function
