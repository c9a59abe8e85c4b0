"""bf16 runs: routers' biases stay in fp32 from the import to the export, as in transformers."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megaprune.mcore import checkpoint, parallel, schedule
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision
from megaprune.mcore.hf_weights import import_weights
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.weights.source import HFSource
from tests.helpers import tiny

ENGINE = EngineOptions(ParallelSizes(), bf16=True)
BIAS = "mlp.gate.e_score_correction_bias"


@pytest.fixture(scope="module")
def biased_model(tiny_model, tmp_path_factory):
    """Save a DeepSeek model in bf16 whose fp32 router biases are closer to each other than bf16 resolves."""
    folder = tmp_path_factory.mktemp("biased") / "model"
    tiny.make_model(folder, "deepseek_v3", torch.bfloat16)
    generator = torch.Generator().manual_seed(11)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name in tensors:
        if name.endswith(BIAS):
            tensors[name] = 6.94 + 0.06 * torch.randn(tensors[name].shape, generator=generator)
            assert not torch.equal(tensors[name], tensors[name].bfloat16().float())
    save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture
def groups():
    """Megatron's groups for one test. Runs in other tests set up their own."""
    parallel.initialize(ParallelSizes())
    yield
    parallel.finish()


def biases(tensors):
    return {name: tensor for name, tensor in tensors.items() if name.endswith(BIAS)}


def rounded(folder, out):
    """Return the model with its routers' biases rounded to bf16."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    (path,) = out.glob("*.safetensors")
    tensors = load_file(path)
    save_file({n: t.bfloat16().float() if n.endswith(BIAS) else t for n, t in tensors.items()}, path, {"format": "pt"})
    return out


@torch.no_grad()
def losses_of_transformers(folder, tokens):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    assert all(bias.dtype == torch.float32 for name, bias in model.named_buffers() if name.endswith(BIAS))
    logits = model(tokens[:, :-1]).logits.float()
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


def built(folder):
    source = HFSource(str(folder))
    arch = source.family.architecture(source.config)
    model = build_model(arch, [arch.num_layers], ENGINE)
    import_weights(model, source)
    return model


@torch.no_grad()
def losses_of(folder, tokens):
    wrapped = in_half_precision(built(folder), ENGINE)
    (logits,) = schedule.forward(wrapped, [tiny.make_batch(tokens)], lambda logits, _: logits.float())
    logits = logits[..., : tiny.VOCAB_SIZE].transpose(0, 1)
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")


@pytest.mark.usefixtures("groups")
def test_bf16_routes_as_transformers_does(biased_model, tmp_path):
    """Compare token by token, because in the mean the effects of rounding on the routing cancel."""
    tokens = tiny.random_tokens(batch=16)
    expected = losses_of_transformers(biased_model, tokens)
    other = losses_of_transformers(rounded(biased_model, tmp_path / "rounded"), tokens)
    found = losses_of(biased_model, tokens)
    difference = (other - expected).abs().mean()
    assert difference > 0.1
    assert (found - expected).abs().mean() < difference / 2


@pytest.mark.usefixtures("groups")
def test_only_parameters_become_bf16(biased_model, tmp_path):
    model = built(biased_model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options = OptimizerOptions(1e-3, 0.0, "constant", 0, 10, weight_decay=0.0, clip_grad=1.0)
    trainer = Trainer(model, ENGINE, options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    biases = [name for name in before if name.endswith("router.expert_bias")]
    assert len(biases) == 3
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype
        assert torch.equal(buffer, before[name]), name
    saved = checkpoint.save(tmp_path, 0, trainer, {})
    for name in biases:
        model.chunks[0].get_buffer(name).zero_()
    checkpoint.load(saved, trainer)
    assert all(torch.equal(model.chunks[0].get_buffer(name), before[name]) for name in biases)


RUNS = {
    "online": [],
    "self": ["--teacher", "self", "--lora-rank", "2", "--lora-alpha", "4"],
    "search": ["--method", "e3", "--search-iters", "2"],
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_exported_biases_are_the_bits_of_the_source(biased_model, tiny_data, tmp_path, flags):
    argv = tiny.select_argv(biased_model, tiny_data, tmp_path / "run", "random")
    tiny.run_here([*argv, "--train-iters", "4", "--bf16", *flags])
    kept = json.loads((tmp_path / "run" / "report.json").read_text())["kept_layers"]
    source, exported = tiny.read_tensors(biased_model), tiny.read_tensors(tmp_path / "run" / "hf")
    pairs = [(name, source[_renamed(name, kept)], tensor) for name, tensor in exported.items()]
    assert sum(name.endswith(BIAS) for name in exported) >= 1
    for name, stored, tensor in pairs:
        assert tensor.dtype == stored.dtype, name
        # with LoRA, the norms are stored in fp32 and not trained
        if name.endswith(BIAS) or ("norm" in name and "self" in flags):
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor.view(torch.int32), stored.view(torch.int32)), name
    assert any("self_attn" in name and not torch.equal(stored, tensor) for name, stored, tensor in pairs)


def _renamed(name, kept):
    return re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{kept[int(match[1])]}.", name)
