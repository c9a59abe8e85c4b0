"""A block-FP8 checkpoint gives the model that its bf16 dequantization gives."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.fp8 import BLOCK, SCALE_SUFFIX, scale_shape
from megaprune.weights.source import HFSource
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_process")

# matrices of several blocks, the last of them cut short
SIZES = dict(hidden_size=144, intermediate_size=200, moe_intermediate_size=136, num_hidden_layers=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The FP8 checkpoint, with the scales in a file of their own, and the one in bf16."""
    model_type, settings = tiny.MOE_FAMILIES["deepseek_v3"]
    generator = torch.Generator().manual_seed(0)
    both = tmp_path_factory.mktemp("bf16"), tmp_path_factory.mktemp("fp8")
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **settings | SIZES), dtype=torch.bfloat16
    ).save_pretrained(both[0])
    plain, quantized, scales = tiny.read_tensors(both[0]), {}, {}
    for name, tensor in plain.items():
        if "_proj" not in name:
            quantized[name] = tensor
            continue
        scale = torch.rand(scale_shape(tensor.shape), generator=generator) + 0.5
        of_each = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: tensor.shape[0], : tensor.shape[1]]
        quantized[name] = torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn)
        plain[name] = (quantized[name].float() * of_each).to(torch.bfloat16)
        scales[name + SCALE_SUFFIX] = scale
    save_file(plain, both[0] / "model.safetensors", metadata={"format": "pt"})
    files = {"model-00001-of-00002.safetensors": quantized, "model-00002-of-00002.safetensors": scales}
    for file, tensors in files.items():
        save_file(tensors, both[1] / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (both[1] / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = json.loads((both[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    (both[1] / "config.json").write_text(json.dumps(config))
    return both


def test_weights_are_bit_equal(folders):
    weights = []
    for folder in folders:
        source = HFSource(folder)
        source.check_tensors()
        arch = source.family.architecture(source.config)
        model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))
        import_weights(model, source)
        weights.append(dict(model.named_parameters()) | dict(model.named_buffers()))
    plain, from_fp8 = weights
    assert plain.keys() == from_fp8.keys() and len(plain) > 30
    for name, weight in plain.items():
        assert torch.equal(weight, from_fp8[name]), name
    assert plain["decoder.layers.2.mlp.experts.local_experts.7.linear_fc1.weight"].std() > 0.5
