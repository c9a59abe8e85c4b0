"""Memory of training steps with and without LoRA, of the same model in one run.

Run as a script, this prints the tables of docs/lora.md.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megaprune.benchmarks.timing import SavedActivations
from megaprune.data.batches import Batch
from megaprune.distillation.objectives import make_objective
from megaprune.distillation.teachers import OnlineTeacher, SelfTeacher, vocab_shard
from megaprune.mcore import parallel
from megaprune.mcore.adapters import attach_adapters
from megaprune.mcore.builder import EngineOptions, build_model, in_half_precision
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import LoRAOptions
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.pipeline_model import PipelineModel
from megaprune.models import family_of
from megaprune.pruning.step import train_step

RANK, SEQ_LENGTH, MICRO_BATCH = 8, 256, 1
# DeepSeek-V3's shape on a small scale: most of the parameters are experts'.
CONFIG = dict(
    model_type="deepseek_v3",
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=8,
    num_key_value_heads=8,
    q_lora_rank=96,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    n_shared_experts=1,
    moe_intermediate_size=256,
    routed_scaling_factor=2.5,
    vocab_size=4096,
    max_position_embeddings=SEQ_LENGTH,
    rms_norm_eps=1e-6,
)
CASES = {"all weights": (False, None), "all weights, online": (False, "online"), "LoRA": (True, None)}
CASES |= {f"LoRA, {teacher}": (True, teacher) for teacher in ("online", "self")}


@dataclass(frozen=True)
class Memory:
    """Bytes in a training step.

    Args:
        activations: maximum that autograd held for the backward pass.
        step: maximum of tensors besides weights, gradients, optimizer and teacher; includes activations.
    """

    weights: int
    trained: int
    gradients: int
    optimizer: int
    teacher: int
    activations: int
    step: int

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.teacher + self.step


def measure(lora: bool, teacher: str | None, bf16: bool) -> Memory:
    """Return the memory of a step of a new model."""
    engine = EngineOptions(ParallelSizes(), bf16=bf16, seq_length=SEQ_LENGTH)
    arch, gate = family_of(CONFIG).architecture(CONFIG), LayerGate()
    shard = vocab_shard(arch)
    model = initialized(build_model(arch, [arch.num_layers], engine, gate))
    if lora:
        attach_adapters(model, LoRAOptions(RANK, 2.0 * RANK), seed=1)
    trainer = Trainer(model, engine, OptimizerOptions(1e-4, 1e-4, "constant", 0, 10, 0.0, 1.0))
    beside, teaches = None, None
    if teacher == "online":
        beside = in_half_precision(initialized(build_model(arch, [arch.num_layers], engine)), engine)
        teaches = OnlineTeacher(beside, shard, top_k=10)
    elif teacher == "self":
        teaches = SelfTeacher(trainer.ddp, gate, shard, top_k=10)
    objective = make_objective("adaptive" if teaches else "ce", "rest", shard, teaches)
    train_step(trainer, [batch(arch.vocab_size)], objective, 0)  # creates the optimizer's state
    activations = SavedActivations(model.parameters())

    def step() -> None:
        with activations:
            train_step(trainer, [batch(arch.vocab_size)], objective, 1)

    peak = peak_of(step)
    states = [optimizer.optimizer for optimizer in trainer.optimizer.chained_optimizers]
    held = [tensor for optimizer in states for state in optimizer.state.values() for tensor in state.values()]
    # the weights that Adam updates: in bf16 a copy in fp32
    held += [weight for optimizer in states for group in optimizer.param_groups for weight in group["params"]]
    weights = list(model.parameters())
    (ddp,) = trainer.ddp.scheduled
    return Memory(
        weights=size(weights),
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        gradients=size(buffer.grad_data for buffer in ddp.buffers + ddp.expert_parallel_buffers),
        optimizer=size(set(held) - set(weights)),
        teacher=size(beside.parameters()) if beside else 0,
        activations=activations.peak,
        step=peak,
    )


def size(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def initialized(model: PipelineModel) -> PipelineModel:
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, 0.02, generator=generator)
    return model


def batch(vocab_size: int) -> Batch:
    tokens = torch.randint(vocab_size, (MICRO_BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(SEQ_LENGTH).expand(MICRO_BATCH, SEQ_LENGTH)
    mask = torch.ones(MICRO_BATCH, SEQ_LENGTH)
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask, positions, list(range(MICRO_BATCH)))


def peak_of(run: Callable[[], None]) -> int:
    """Return the maximum number of bytes in tensors during a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.fixture(scope="module")
def measured():
    parallel.initialize(ParallelSizes())
    yield {name: measure(lora, teacher, bf16=False) for name, (lora, teacher) in CASES.items()}
    parallel.finish()


@pytest.mark.slow
def test_frozen_weights_take_their_own_memory_and_no_more(measured):
    everything, lora = measured["all weights"], measured["LoRA"]
    assert everything.weights == 4 * everything.trained
    assert lora.weights == everything.weights + 4 * lora.trained
    for memory in (everything, lora):
        # buffers are padded, Adam counts its steps
        assert memory.gradients == pytest.approx(4 * memory.trained, rel=0.01)
        assert memory.optimizer == pytest.approx(8 * memory.trained, rel=0.01)
    assert lora.trained < 0.1 * everything.trained
    assert lora.activations < everything.activations < everything.step
    assert lora.peak < 0.5 * everything.peak


def test_self_teacher_takes_no_memory(measured):
    alone, online, by_itself = (measured[name] for name in ("LoRA", "LoRA, online", "LoRA, self"))
    assert online.teacher == measured["all weights"].weights
    assert by_itself.teacher == 0
    assert by_itself.peak < online.peak - 0.99 * online.teacher
    assert by_itself.peak == pytest.approx(alone.peak, rel=0.01)


def table(bf16: bool) -> str:
    rows = [
        "| step | weights | gradients | optimizer | teacher | step itself (activations) | peak |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, (lora, teacher) in CASES.items():
        memory = measure(lora, teacher, bf16)
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.teacher)
        step, activations, peak = (f"{x / 1e6:.1f}" for x in (memory.step, memory.activations, memory.peak))
        rows.append(f"| {name} | {' | '.join(f'{x / 1e6:.1f}' for x in parts)} | {step} ({activations}) | {peak} |")
    return "\n".join(rows)


if __name__ == "__main__":
    parallel.initialize(ParallelSizes())
    for bf16 in (False, True):
        print(f"\n{'bf16' if bf16 else 'fp32'}, megabytes\n\n{table(bf16)}")
    parallel.finish()
