"""The memory model against steps of small models: exact bytes of persistent tensors, measured peaks of others."""

from dataclasses import dataclass, field

import pytest
import torch
from megatron.core import parallel_state
from torch.profiler import ProfilerActivity, profile

from megaprune.data.batches import Batch
from megaprune.distillation.losses import cross_entropy
from megaprune.distillation.teachers import vocab_shard
from megaprune.importance.evaluator import LayerEvaluator
from megaprune.mcore import parallel, schedule
from megaprune.mcore.builder import EngineOptions, build_model
from megaprune.mcore.layers.gated import LayerGate
from megaprune.mcore.layers.lora import TARGETS, LoRAOptions, add_adapters
from megaprune.mcore.optimizer import OptimizerOptions, Trainer
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.simulation import SimulatedCluster, simulated_rank
from megaprune.models import family_of
from megaprune.planning.activations import Activations, Passes
from megaprune.planning.memory import (
    TrainingState,
    importance_memory,
    micro_batches_in_flight,
    training_memory,
)
from megaprune.selection.budget import Budget
from tests.helpers.real_configs import DEEPSEEK_R1, OPENPANGU_ULTRA, QWEN2_5_0_5B, QWEN3_30B_A3B, QWEN3_32B

SEQ_LENGTH, WINDOWS, LORA_RANK = 128, 2, 8
_SIZES = dict(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_hidden_layers=4, vocab_size=1000)
_MOE = _SIZES | dict(moe_intermediate_size=64, num_experts_per_tok=4)
# Values are as wide as keys: on the CPU, torch's attention is not fused otherwise.
_LATENTS = (48, 32, 16, 16, 32)
_DEEPSEEK = dict(
    zip(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), _LATENTS, strict=True)
)
_PANGU = dict(
    zip((f"attention_{x}_dim" for x in ("q_lora", "kv_lora", "qk", "qk_rope", "v")), _LATENTS, strict=True),
    num_routed_experts=8,
    num_dense_layers=2,
)
MODELS = {
    "dense": QWEN3_32B | _SIZES | dict(num_key_value_heads=2, head_dim=32),
    "tied": QWEN2_5_0_5B | _SIZES | dict(num_key_value_heads=2, intermediate_size=512),
    "mla-moe": DEEPSEEK_R1
    | _MOE
    | _DEEPSEEK
    | dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1),
    "sandwich": OPENPANGU_ULTRA | _MOE | _PANGU,
    "softmax-moe": QWEN3_30B_A3B | _MOE | dict(num_key_value_heads=2, head_dim=32, num_experts=8),
}


@dataclass(frozen=True)
class Case:
    """Step of one rank: the first of its pipeline stage."""

    model: str
    bf16: bool = False
    recompute: str | None = None
    targets: tuple[str, ...] = ()
    world_size: int = 1
    sizes: dict = field(default_factory=dict)
    stage: int = 0
    micro_batches: int = 1
    distributed: bool = False

    @property
    def lora(self):
        return LoRAOptions(LORA_RANK, 16, self.targets) if self.targets else None


TP2 = dict(world_size=2, sizes=dict(tensor=2, sequence_parallel=True))
PP4 = dict(world_size=4, sizes=dict(pipeline=4), micro_batches=6)
CASES = {
    "dense": Case("dense"),
    "dense-bf16": Case("dense", bf16=True),
    "dense-full-recompute": Case("dense", recompute="full"),
    "dense-selective-recompute": Case("dense", recompute="selective"),
    "dense-lora": Case("dense", targets=TARGETS),
    "dense-lora-of-attention": Case("dense", bf16=True, targets=("linear_qkv", "linear_proj")),
    "dense-lora-full-recompute": Case("dense", targets=TARGETS, recompute="full"),
    "dense-tp2": Case("dense", **TP2),
    "dense-first-of-4-stages": Case("dense", **PP4),
    "dense-third-of-4-stages": Case("dense", bf16=True, stage=2, **PP4),
    "dense-last-of-4-stages": Case("dense", stage=3, **PP4),
    "dense-dp2-distributed": Case("dense", bf16=True, world_size=2, distributed=True),
    "tied": Case("tied"),
    "mla-moe": Case("mla-moe"),
    "mla-moe-bf16": Case("mla-moe", bf16=True),
    "mla-moe-full-recompute": Case("mla-moe", bf16=True, recompute="full"),
    "mla-moe-lora": Case("mla-moe", targets=TARGETS),
    "mla-moe-lora-bf16": Case("mla-moe", bf16=True, targets=TARGETS),
    "mla-moe-tp2": Case("mla-moe", **TP2),
    "mla-moe-second-of-4-stages": Case("mla-moe", targets=TARGETS, stage=1, **PP4),
    "sandwich": Case("sandwich"),
    "softmax-moe": Case("softmax-moe", bf16=True),
}


@pytest.fixture(scope="module", params=CASES)
def compared(request):
    """Estimated and measured memory of a case: bytes of each kind, and the peak beyond them."""
    parallel.leave()
    case = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        without_gloo(patch)
        return predicted(case), measured(case)


def without_gloo(patch):
    """Remove CPU groups, which a simulated cluster does not have. The optimizer uses them only to save itself."""
    for name in ("get_data_parallel_group", "get_expert_data_parallel_group"):
        patch.setattr(parallel_state, f"{name}_gloo", getattr(parallel_state, name))


def predicted(case):
    sizes, arch, stages = layout(case)
    passes_ = Passes(
        WINDOWS,
        SEQ_LENGTH,
        bf16=case.bf16,
        tensor=sizes.tensor,
        sequence_parallel=sizes.sequence_parallel,
        recompute=case.recompute,
        adapter_rank=LORA_RANK if case.targets else None,
        adapter_targets=case.targets,
        fused_norm=False,
    )
    options = EngineOptions(sizes, bf16=case.bf16, recompute_granularity=case.recompute, seq_length=SEQ_LENGTH)
    share = SimulatedCluster(options, case.world_size, case.lora).shares(arch, stages)[case.stage]
    replicas = case.world_size // sizes.model if case.distributed else 1
    first = sum(stages[: case.stage])
    return training_memory(
        share,
        TrainingState(case.bf16, replicas, replicas),
        Activations(arch, passes_),
        [arch.is_moe(layer) for layer in range(first, first + stages[case.stage])],
        micro_batches_in_flight(case.stage, len(stages), case.micro_batches),
        case.stage == len(stages) - 1,
    )


def measured(case):
    sizes, arch, stages = layout(case)
    engine = EngineOptions(sizes, bf16=case.bf16, recompute_granularity=case.recompute, seq_length=SEQ_LENGTH)
    rank = case.stage * (case.world_size // len(stages))
    with simulated_rank(rank, case.world_size, sizes):
        model = build_model(arch, stages, engine)
        if case.lora is not None:
            add_adapters(model, case.lora)
        initialize(model)
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        trainer = Trainer(model, engine, OptimizerOptions(1e-5, 1e-5, "constant", 0, 10, 0.0, 1.0, case.distributed))
        step = Step(trainer, arch, case.micro_batches)
        step()
        trainer.optimizer.step()
        return dict(
            weights=weights, gradients=gradient_bytes(trainer), optimizer=optimizer_bytes(trainer), peak=peak_of(step)
        )


def layout(case):
    sizes = ParallelSizes(**case.sizes)
    arch = family_of(MODELS[case.model]).architecture(MODELS[case.model])
    return sizes, arch, [arch.num_layers // sizes.pipeline] * sizes.pipeline


class Step:
    """Forward and backward passes of an iteration."""

    def __init__(self, trainer, arch, micro_batches):
        self.trainer, self.shard = trainer, vocab_shard(arch)
        tokens = torch.randint(arch.vocab_size, (WINDOWS, SEQ_LENGTH), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(SEQ_LENGTH).expand(WINDOWS, SEQ_LENGTH)
        self.batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions, list(range(WINDOWS)))
        self.micro_batches = micro_batches

    def __call__(self):
        self.trainer.zero_grad()
        schedule.forward_backward(self.trainer.ddp, [self.batch] * self.micro_batches, self.loss)

    def loss(self, logits, tokens):
        return cross_entropy(logits, tokens.labels, self.shard).mean()


@torch.no_grad()
def initialize(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def gradient_bytes(trainer):
    (ddp,) = trainer.ddp.scheduled
    return sum(buffer.grad_data.nbytes for buffer in (*ddp.buffers, *ddp.expert_parallel_buffers))


def optimizer_bytes(trainer):
    """Return the bytes of the moments, and of the copies of weights that the optimizer updates in their place."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    total = 0
    for optimizer in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        stepped = [parameter for group in optimizer.optimizer.param_groups for parameter in group["params"]]
        total += sum(parameter.nbytes for parameter in stepped if parameter.untyped_storage().data_ptr() not in own)
        moments = [state[name] for state in optimizer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        total += sum(moment.nbytes for moment in moments)
    return total


def peak_of(run):
    """Return the maximum number of bytes that the allocator held during a call, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def test_what_stays_is_exact(compared):
    memory, found = compared
    assert memory.weights == found["weights"]
    # the distributed optimizer pads its shards
    assert memory.gradients == pytest.approx(found["gradients"], rel=1e-2)
    assert memory.optimizer == pytest.approx(found["optimizer"], rel=1e-2)


def test_peak_is_near_the_measured_one(compared):
    memory, found = compared
    assert memory.activations + memory.working == pytest.approx(found["peak"], rel=0.1)


def test_total_adds_up(compared):
    memory, found = compared
    assert memory.teacher == 0
    assert memory.total == pytest.approx(sum(found.values()), rel=0.05)


@pytest.mark.parametrize("model", ["dense", "mla-moe"])
def test_importance_passes_are_near_the_measured_ones(model):
    """Of a vocabulary whose logits are the largest tensors, as in real models."""
    parallel.leave()
    config = MODELS[model] | {"vocab_size": 8000}
    arch, sizes = family_of(config).architecture(config), ParallelSizes()
    engine = EngineOptions(sizes, seq_length=SEQ_LENGTH)
    (share,) = SimulatedCluster(engine, 1).shares(arch, [arch.num_layers])
    activations = Activations(arch, Passes(WINDOWS, SEQ_LENGTH, fused_norm=False))
    kinds = [arch.is_moe(layer) for layer in range(arch.num_layers)]
    planned = importance_memory(share, activations, kinds, True, None, 1, 1)
    with simulated_rank(0, 1, sizes):
        gate = LayerGate()
        built = build_model(arch, [arch.num_layers], engine, gate)
        initialize(built)
        tokens = torch.randint(arch.vocab_size, (WINDOWS, SEQ_LENGTH), generator=torch.Generator().manual_seed(0))
        positions = torch.arange(SEQ_LENGTH).expand(WINDOWS, SEQ_LENGTH)
        batch = Batch(tokens, tokens, torch.ones(tokens.shape), positions, list(range(WINDOWS)))
        budget = Budget.of_layers(arch.num_layers, arch.num_layers - 1)
        evaluator = LayerEvaluator(built, gate, lambda *_: [batch], WINDOWS, budget, vocab_shard(arch))
        peak = peak_of(lambda: evaluator.losses([[0, 2, 3], [0, 1, 3]]))
    assert planned.activations + planned.working == pytest.approx(peak, rel=0.15)
