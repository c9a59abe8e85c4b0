"""Adapters on one process: their effect, and every form in which they are exported."""

import re
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from megaprune.cli.prune import parse_config
from megaprune.mcore import schedule
from megaprune.mcore.adapters import attach_adapters, export_adapter
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.hf_weights import export_weights, import_weights
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import TARGETS, LoRAOptions, adapted_layers, adapters_off, merge_adapters
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models.names import is_adapter
from megaprune.pruning.resolve import open_run
from megaprune.utils.errors import UsageError
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers import tiny

pytestmark = pytest.mark.usefixtures("one_process")

BATCH = tiny.make_batch(tiny.random_tokens())
# Biases on query, key and value; fused projections; MLA, dense layers, routed and shared experts; dense layers between
# those with experts; names that differ in transformers, of modules and of the whole language model.
KEPT = {
    "qwen2": [0, 2, 6],
    "phi3": [0, 2],
    "deepseek_v3": [0, 2, 3, 4],
    "qwen3_moe": [0, 1, 3],
    "minimax_m2": [0, 1, 3],
    "kimi_k25": [0, 2, 3],
}


@pytest.fixture(params=KEPT)
def family(request):
    return request.param


@pytest.fixture
def source(tiny_model, family):
    return HFSource(tiny_model(family))


def build(source, targets=TARGETS, kept=None, gate=None, seed=1):
    """Return a model of the kept layers (None: all) with adapters that are not zero."""
    arch = source.family.architecture(source.config)
    arch = arch if kept is None else arch.pruned(kept)
    model = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()), gate)
    import_weights(model, source, kept)
    attach_adapters(model, LoRAOptions(4, 8.0, targets), seed, kept)
    generator = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_b.data.normal_(0, 0.02, generator=generator)
    return model


def logits(model):
    """Return [b, s, vocab]."""
    return schedule.forward(model, [BATCH], lambda logits, _: logits.transpose(0, 1).clone())[0][..., : tiny.VOCAB_SIZE]


def without_effect(model):
    for layer in adapted_layers(model).values():
        layer.lora_b.data.zero_()


def test_fresh_adapters_change_nothing(source):
    arch = source.family.architecture(source.config)
    base = build_model(arch, [arch.num_layers], EngineOptions(ParallelSizes()))
    import_weights(base, source)
    model = build(source)
    assert (logits(model) - logits(base)).abs().max() > 0.1
    without_effect(model)
    assert torch.equal(logits(model), logits(base))


def test_adapter_of_a_layer_is_the_same_in_the_pruned_model(source, family):
    whole, pruned = adapted_layers(build(source)), adapted_layers(build(source, kept=KEPT[family]))
    for name, layer in pruned.items():
        number = int(re.search(r"layers\.(\d+)\.", name)[1])
        original = whole[name.replace(f"layers.{number}.", f"layers.{KEPT[family][number]}.")]
        assert torch.equal(layer.lora_a, original.lora_a)
    matrices = [layer.lora_a for layer in whole.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(matrices) for b in matrices[:i] if a.shape == b.shape)


def test_merged_is_unmerged(source):
    model = build(source)
    unmerged = logits(model)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), unmerged, atol=1e-5 * unmerged.abs().max().item(), rtol=0)
    with adapters_off(model):
        torch.testing.assert_close(logits(model), unmerged, atol=1e-5 * unmerged.abs().max().item(), rtol=0)


def test_original_model_is_seen_with_adapters_off_and_all_layers_on(source):
    gate = LayerGate()
    model = build(source, gate=gate)
    without, adapted = build(source), logits(model)
    without_effect(without)
    gate.bypass({1, 2})
    bypassed = logits(model)
    mask = torch.ones(len(model.layers()))
    mask[1] = 0
    gate.set(mask)
    masked, kept_mask = logits(model), gate.mask
    with adapters_off(model), gate.all_layers():
        assert torch.equal(logits(model), logits(without))
    assert gate.mask is kept_mask and gate.bypasses(2)
    assert torch.equal(logits(model), masked)
    gate.set(None)
    assert torch.equal(logits(model), bypassed)
    gate.bypass(())
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("distributed", [False, True])
def test_base_weights_take_no_gradient_and_no_optimizer_memory(source, distributed):
    model = build(source)
    options = OptimizerOptions(1e-2, 1e-2, "constant", 0, 10, 0.1, 1.0, distributed)
    trainer = Trainer(model, EngineOptions(ParallelSizes()), options)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for iteration in range(2):
        trainer.zero_grad()
        schedule.forward_backward(trainer.ddp, [BATCH], lambda logits, _: logits.float().square().mean())
        trainer.step(iteration)
    held = 0
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != is_adapter(name), name
        assert is_adapter(name) or weight.grad is getattr(weight, "main_grad", None) is None, name
        held += weight.numel() if is_adapter(name) else 0
    (ddp,) = trainer.ddp.scheduled
    buffers = ddp.buffers + ddp.expert_parallel_buffers
    assert held <= sum(buffer.grad_data.numel() for buffer in buffers) < 1.1 * held
    states = [
        state for optimizer in trainer.optimizer.chained_optimizers for state in optimizer.optimizer.state.values()
    ]
    moments = sum(state[key].numel() for state in states for key in ("exp_avg", "exp_avg_sq"))
    assert 2 * held <= moments < 1.1 * 2 * held


@pytest.mark.parametrize(
    "targets", [TARGETS, ("linear_fc2",), ("linear_fc1", "linear_proj")], ids=["all", "fc2", "fc1-proj"]
)
def test_merged_export_and_peft_give_the_logits_of_the_model_in_training(source, family, targets, tmp_path):
    kept, model = KEPT[family], build(source, targets, KEPT[family])
    trained = logits(model)
    for name in ("base", "adapter", "merged"):
        (tmp_path / name).mkdir()
    write_pruned_weights(source, kept, tmp_path / "base", 10**9)
    options = LoRAOptions(4, 8.0, targets)
    export_adapter(model, source, kept, tmp_path / "adapter", options, str(tmp_path / "base"))
    merge_adapters(model)
    export_weights(model, source, kept, tmp_path / "merged", 10**9)
    for name in ("base", "merged"):
        write_pruned_config(source, kept, tmp_path / name)
    assert (tiny.hf_logits(tmp_path / "base", BATCH.tokens) - trained).abs().max() > 0.1
    torch.testing.assert_close(tiny.hf_logits(tmp_path / "merged", BATCH.tokens), trained, atol=1e-4, rtol=0)
    torch.testing.assert_close(peft_logits(tmp_path), trained, atol=1e-4, rtol=0)


@torch.no_grad()
def peft_logits(folder):
    """Return the logits of the base with its adapter. PEFT must find exactly the adapter's tensors."""
    model = PeftModel.from_pretrained(tiny.load_hf(folder / "base"), folder / "adapter").eval()
    wanted = {name.replace(".default", "") for name, _ in model.named_parameters() if ".lora_" in name}
    assert wanted == tiny.read_tensors(folder / "adapter").keys()
    return model(BATCH.tokens).logits


@pytest.mark.parametrize("whole", [False, True])
def test_adapter_names_the_experts_one_by_one_for_code_that_holds_them_so(tiny_model, whole, tmp_path):
    source, kept = HFSource(tiny_model("deepseek_v3")), KEPT["deepseek_v3"]
    source.family = replace(source.family, stacks_experts=False)
    model = build(source, kept=None if whole else kept)
    for name in ("adapter", "merged"):
        (tmp_path / name).mkdir()
    export_adapter(model, source, kept, tmp_path / "adapter", LoRAOptions(4, 8.0), "base", whole)
    merge_adapters(model)
    export_weights(model, source, kept, tmp_path / "merged", 10**9, whole)
    adapter, merged = tiny.read_tensors(tmp_path / "adapter"), tiny.read_tensors(tmp_path / "merged")
    write_pruned_weights(source, kept, tmp_path, 10**9)
    base = tiny.read_tensors(tmp_path)
    for name, weight in merged.items():
        parts = [adapter.get(f"base_model.model.{name.replace('.weight', f'.lora_{x}.weight')}") for x in "BA"]
        assert (parts[0] is not None) == ("_proj" in name), name
        delta = 8.0 / 4 * (parts[0] @ parts[1]) if "_proj" in name else 0
        torch.testing.assert_close(base[name] + delta, weight, msg=name)


def test_refused_are_targets_that_the_model_does_not_have(tiny_model, tiny_data, tmp_path):
    flags = ("--lora-rank", "4", "--lora-target-modules", "linear_q_up_proj", "linear_qkv")
    with pytest.raises(
        UsageError, match="--lora-target-modules linear_qkv is not a linear layer of this model: choose from"
    ):
        open_run(parse_config(tiny.prune_argv(tiny_model("deepseek_v3"), tiny_data, tmp_path / "run", *flags)), 1)
    argv = tiny.prune_argv(tiny_model("qwen3"), tiny_data, tmp_path / "run", *flags[:3], flags[4])
    options, _ = open_run(parse_config(argv), 1)
    assert options.lora == LoRAOptions(4, 8.0, ("linear_qkv",))


def test_refused_are_experts_whose_matrices_peft_holds_otherwise(tiny_model, tiny_data, tmp_path):
    argv = tiny.prune_argv(tiny_model("gpt_oss"), tiny_data, tmp_path / "run", "--lora-rank", "4")
    options, _ = open_run(parse_config(argv), 1)
    assert options.lora.targets == ("linear_qkv", "linear_proj")
    for target in ("linear_fc1", "linear_fc2"):
        with pytest.raises(
            UsageError, match=f"{target} is not supported in the family gpt_oss.*linear_qkv linear_proj"
        ):
            open_run(parse_config([*argv, "--lora-target-modules", target]), 1)
    with pytest.raises(UsageError, match="--expert-tensor-parallel-size 2: .* biases: choose 1"):
        open_run(parse_config([*argv, "--expert-tensor-parallel-size", "2"]), 2)


def test_adapters_stand_where_they_were_asked_for(tiny_model):
    layers = adapted_layers(build(HFSource(tiny_model("qwen3")), targets=("linear_qkv",)))
    assert {name.rpartition(".")[2] for name in layers} == {"linear_qkv"}
    assert len(layers) == 7


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--export-adapter"], "--export-adapter needs --lora-rank"),
        (["--teacher", "self"], "--teacher self needs --lora-rank"),
        (["--lora-rank", "0"], "--lora-rank 0 is less than 1"),
        (["--lora-rank", "4", "--lora-alpha", "-1"], "--lora-alpha -1.0 is not above 0"),
        (
            ["--method", "random", "--search-iters", "0", "--train-iters", "0", "--lora-rank", "4", "--export-adapter"],
            "--export-adapter needs --train-iters above 0",
        ),
    ],
)
def test_refused_are_flags_that_contradict_each_other(flags, word, tmp_path):
    with pytest.raises(UsageError, match=word):
        parse_config(tiny.prune_argv(tmp_path, tmp_path, tmp_path, "--lr-warmup-iters", "0", *flags))
