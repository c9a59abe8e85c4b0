"""Stored dtypes: supported ones are read everywhere, others are refused everywhere with the same line."""

import json

import pytest
import torch

from megaprune.cli.main import attempt
from megaprune.weights.fp8 import BLOCK, SCALE_SUFFIX, dequantize, scale_shape
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers.checkpoints import LLAMA, random_tensors, write_folder

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}}
# matrices of several blocks, the last of them cut short
LARGE = LLAMA | {"hidden_size": 144, "intermediate_size": 200, "num_hidden_layers": 2}
MOE = LARGE | {
    "model_type": "qwen3_moe",
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "mlp_only_layers": [],
}
NORM, MATRIX = "model.layers.1.input_layernorm.weight", "model.layers.1.mlp.up_proj.weight"


def powers_of_two(shape, seed):
    """Return scales as F8_E8M0 stores them, and their values."""
    exponents = torch.randint(-20, 21, shape, generator=torch.Generator().manual_seed(seed))
    return torch.ldexp(torch.ones(shape), exponents).to(torch.float8_e8m0fnu), exponents


def by_element(weight, exponents):
    """Return each number, decoded separately from its bits."""
    rows, columns = torch.arange(weight.shape[0]) // BLOCK, torch.arange(weight.shape[1]) // BLOCK
    return torch.ldexp(weight.double(), exponents[rows][:, columns]).to(torch.bfloat16)


def quantized(config):
    """Tensors and scales of a model, and its weights in bf16."""
    tensors, scales, expected = random_tensors(config), {}, {}
    for name, tensor in tensors.items():
        expected[name] = tensor
        if "_proj" in name:
            generator = torch.Generator().manual_seed(len(scales))
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn)
            scale, exponents = powers_of_two(scale_shape(tensor.shape), len(scales))
            scales[name + SCALE_SUFFIX], expected[name] = scale, by_element(tensors[name], exponents)
    return tensors | scales, expected


def stacked(tensors, layers, experts):
    """Return the same tensors with each layer's experts in two tensors, scales likewise."""
    tensors = dict(tensors)
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        for end, stored in ((".weight", ""), (".weight" + SCALE_SUFFIX, SCALE_SUFFIX)):
            pairs = [[tensors.pop(f"{prefix}.{e}.{x}_proj{end}") for x in ("gate", "up")] for e in range(experts)]
            tensors[f"{prefix}.gate_up_proj{stored}"] = torch.stack([torch.cat(pair) for pair in pairs])
            downs = [tensors.pop(f"{prefix}.{e}.down_proj{end}") for e in range(experts)]
            tensors[f"{prefix}.down_proj{stored}"] = torch.stack(downs)
    return tensors


def test_powers_of_two_are_scales():
    weight = torch.randn(300, 130).to(torch.float8_e4m3fn)
    scale, exponents = powers_of_two(scale_shape(weight.shape), 1)
    assert torch.equal(dequantize(weight, scale), by_element(weight, exponents))
    assert torch.equal(dequantize(weight[100:200], scale, row=100), by_element(weight, exponents)[100:200])


@pytest.mark.parametrize("how", ["dense", "experts", "stacks"])
def test_e8m0_scales_are_read_everywhere(tmp_path, how):
    config = LARGE if how == "dense" else MOE
    tensors, expected = quantized(config)
    write_folder(tmp_path / "fp8", config | FP8, stacked(tensors, 2, 3) if how == "stacks" else tensors)
    source = HFSource(tmp_path / "fp8")
    source.check_tensors()
    assert set(source.names) == set(expected)
    for name, tensor in expected.items():
        assert source.dtype(name) == tensor.dtype and source.shape(name) == tensor.shape
        assert torch.equal(source.read(name), tensor), name
        assert torch.equal(source.read(name, 0, 70, 144), tensor[70:144]), name
    words = ["--hf-model", str(tmp_path / "fp8"), "--megatron-path", str(tmp_path / "m")]
    assert attempt("convert", ["import", *words]) == (0, None)
    words = ["--megatron-path", str(tmp_path / "m"), "--hf-path", str(tmp_path / "hf")]
    assert attempt("convert", ["export", *words]) == (0, None)
    (tmp_path / "surgery").mkdir()
    write_pruned_weights(source, [0, 1], tmp_path / "surgery", 200_000)
    write_pruned_config(source, [0, 1], tmp_path / "surgery")
    for out in (tmp_path / "hf", tmp_path / "surgery"):
        found = HFSource(out)
        found.check_tensors()
        assert any(".experts.gate_up_proj" in name for name in found.stored_files) == (how == "stacks")
        assert all(torch.equal(found.read(name), tensor) for name, tensor in expected.items())
        assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_stacks_whose_blocks_reach_over_gate_and_up(tmp_path):
    config = MOE | {"moe_intermediate_size": 192}
    tensors = stacked(quantized(config)[0], 2, 3)
    write_folder(tmp_path / "fp8", config | FP8, tensors)
    refused(tmp_path, tmp_path / "fp8", "gate_up_proj is FP8 in blocks that reach over gate and up")


# Refusals


def refused(tmp_path, folder, *said):
    """Check that `convert`, surgery and a run refuse with the same line and write nothing. Return the line."""
    common = ["--hf-model", folder, "--seq-length", "32", "--save", tmp_path / "run"]
    manual, e3 = ["--method", "manual", "--prune-layers", "1"], ["--num-layers-to-prune", "1"]
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    lines = set()
    for verb, words in (
        ("convert", ["import", "--hf-model", folder, "--megatron-path", tmp_path / "m"]),
        ("prune", [*common, *manual, "--train-iters", "0"]),
        ("prune", [*common, *e3, "--train-data", data, "--train-iters", "4"]),
    ):
        status, line = attempt(verb, [str(word) for word in words])
        assert status == 1 and all(word in line for word in said), line
        lines.add(line.partition("error: ")[2])
    assert len(lines) == 1
    assert not (tmp_path / "m").exists() and not (tmp_path / "run").exists() and not list(tmp_path.glob("*.tmp"))
    return lines.pop()


UNREAD = {
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "BOOL": torch.bool,
    "F64": torch.float64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}


@pytest.mark.parametrize("dtype", UNREAD)
@pytest.mark.parametrize("name", [NORM, MATRIX])
def test_dtypes_that_no_model_is_read_in(tmp_path, dtype, name):
    tensors = random_tensors(LLAMA)
    tensors[name] = torch.ones(tensors[name].shape).to(UNREAD[dtype])
    write_folder(tmp_path / "bad", LLAMA, tensors, num_files=2)
    refused(tmp_path, tmp_path / "bad", f"{name} is stored as {dtype}, which", ".safetensors: ", "of-00002")


@pytest.mark.parametrize("dtype", ["F64", "I32", "U8", "F8_E5M2", "F8_E4M3"])
def test_dtypes_that_no_scale_is_read_in(tmp_path, dtype):
    tensors, _ = quantized(LARGE)
    name = MATRIX + SCALE_SUFFIX
    tensors[name] = torch.ones(tensors[name].shape).to(UNREAD.get(dtype, torch.float8_e4m3fn))
    write_folder(tmp_path / "bad", LARGE | FP8, tensors)
    refused(tmp_path, tmp_path / "bad", f"{name} is stored as {dtype}, which")


def test_tensors_that_no_model_reads_are_checked_too(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_folder(tmp_path / "bad", LLAMA, random_tensors(LLAMA) | {name: torch.ones(2, dtype=torch.float64)})
    refused(tmp_path, tmp_path / "bad", f"{name} is stored as F64, which")


def test_fp8_is_for_matrices(tmp_path):
    tensors, _ = quantized(LARGE)
    tensors[NORM], tensors[NORM + SCALE_SUFFIX] = torch.ones(144).to(torch.float8_e4m3fn), torch.ones(2)
    write_folder(tmp_path / "bad", LARGE | FP8, tensors)
    refused(tmp_path, tmp_path / "bad", f"{NORM} is stored as F8_E4M3, but is not a matrix")


# Quantization


BESIDE = {
    "hf_quant_config.json": ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "FP8"),
    "quantize_config.json": ({"bits": 4, "group_size": 128, "desc_act": False}, "bits 4"),
    "quant_config.json": ({"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}, "w_bit 4"),
    "quant_model_description_w8a8_dynamic.json": ({"model_quant_type": "W8A8_DYNAMIC"}, "W8A8_DYNAMIC"),
}


@pytest.mark.parametrize("file", BESIDE)
def test_quantization_that_a_file_beside_the_config_declares(tmp_path, file):
    settings, said = BESIDE[file]
    tensors = random_tensors(LLAMA, torch.bfloat16)
    tensors[MATRIX] = tensors[MATRIX].to(torch.float8_e4m3fn)
    tensors[MATRIX + "_scale"] = torch.ones(1)
    write_folder(tmp_path / "bad", LLAMA, tensors)
    (tmp_path / "bad" / file).write_text(json.dumps(settings))
    line = refused(tmp_path, tmp_path / "bad", "is quantized", file, said)
    assert SCALE_SUFFIX not in line and "incomplete" not in line


def test_a_quantized_cache_is_no_quantized_model(tmp_path):
    settings = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    tensors = write_folder(tmp_path, LLAMA)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(settings))
    source = HFSource(tmp_path)
    source.check_tensors()
    assert set(source.names) == tensors.keys()


@pytest.mark.parametrize(
    "key, settings, said",
    [
        ("quantization_config", {"quant_method": "awq", "bits": 4}, "quant_method awq, bits 4"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": None}, "quant_method fp8"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size [64, 64]"),
        ("quantization", {"group_size": 64, "bits": 4}, "bits 4"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization_config", "awq", "config.json"),
    ],
)
def test_quantization_that_the_config_declares(tmp_path, key, settings, said):
    write_folder(tmp_path / "bad", LLAMA | {key: settings})
    refused(tmp_path, tmp_path / "bad", "is quantized: config.json", said)


@pytest.mark.parametrize("end", [".qweight", ".weight_packed", ".weight.absmax", ".scales"])
def test_quantization_that_only_the_tensors_tell(tmp_path, end):
    tensors = random_tensors(LLAMA)
    tensors[MATRIX.removesuffix(".weight") + end] = tensors.pop(MATRIX)
    write_folder(tmp_path / "bad", LLAMA, tensors)
    name = MATRIX.removesuffix(".weight") + end
    assert "incomplete" not in refused(tmp_path, tmp_path / "bad", f"is quantized: it holds {name}")


def test_fp8_without_scales_names_what_is_there(tmp_path):
    tensors, _ = quantized(LARGE)
    tensors.pop(MATRIX + SCALE_SUFFIX)
    write_folder(tmp_path / "bad", LARGE | FP8, tensors)
    refused(tmp_path, tmp_path / "bad", f"{MATRIX} is stored as F8_E4M3, and", f"lacks {MATRIX}{SCALE_SUFFIX}")


@pytest.mark.parametrize(
    "file, said",
    [
        ("adapter_model.safetensors", "only a LoRA adapter"),
        ("consolidated.safetensors", "only consolidated.safetensors"),
        ("model-Q4.gguf", "only GGUF"),
        ("pytorch_model.bin", "only pickled weights"),
    ],
)
def test_weights_of_other_kinds(tmp_path, file, said):
    write_folder(tmp_path / "bad", LLAMA)
    (tmp_path / "bad" / "model.safetensors").rename(tmp_path / "bad" / file)
    refused(tmp_path, tmp_path / "bad", "holds neither model.safetensors nor", said)


def test_an_adapter_in_the_place_of_weights(tmp_path):
    adapter = {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 16)}
    write_folder(tmp_path / "bad", LLAMA, adapter)
    refused(tmp_path, tmp_path / "bad", "is a LoRA adapter: merge it")


def test_config_of_several_models_or_of_an_unclear_one(tmp_path):
    for edit, said in (
        ({"text_config": {"tie_word_embeddings": True}}, "text_config"),
        ({"tie_word_embeddings": "false"}, "'tie_word_embeddings' in config.json is 'false'"),
        ({"tie_word_embeddings": None}, "'tie_word_embeddings' in config.json is None"),
    ):
        write_folder(tmp_path / "bad", LLAMA | edit, random_tensors(LLAMA))
        refused(tmp_path, tmp_path / "bad", said)


def test_embeddings_of_a_config_that_does_not_say_are_not_tied(tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    tensors = write_folder(tmp_path / "whole", config)
    HFSource(tmp_path / "whole").check_tensors()
    tensors.pop("lm_head.weight")
    write_folder(tmp_path / "bad", config, tensors)
    refused(tmp_path, tmp_path / "bad", "lacks lm_head.weight, and config.json does not tie the embeddings")
