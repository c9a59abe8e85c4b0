"""Released models at full size: every stage of real layouts is built and reads its part of the real checkpoint."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from megatron.core import parallel_state

from megaprune import device
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, build_model, check_parallel_sizes
from megaprune.mcore.hf_weights import rules_by_parameter
from megaprune.mcore.parallel import ParallelSizes
from megaprune.mcore.simulation import simulated_rank
from megaprune.models.names import source_name
from megaprune.models.shards import COPY, VOCAB, TensorParallel, padded_vocab_size
from megaprune.models.sizes import model_size
from tests.helpers.hf_tensors import expected_tensors
from tests.helpers.newer_configs import OLMO_3_32B, PHI_4
from tests.helpers.newer_moe_configs import GLM_4_5, MINIMAX_M2
from tests.helpers.paper_source import PaperSource
from tests.helpers.real_configs import DEEPSEEK_R1, LLAMA_2_7B, OPENPANGU_ULTRA, QWEN2_5_14B, QWEN3_30B_A3B, QWEN3_32B

pytestmark = pytest.mark.slow

OPENPANGU_VLLM_SPELLING = {
    {
        "attention_q_lora_dim": "q_lora_rank",
        "attention_kv_lora_dim": "kv_lora_rank",
        "attention_qk_dim": "qk_nope_head_dim",
        "attention_qk_rope_dim": "qk_rope_head_dim",
        "attention_v_dim": "v_head_dim",
        "num_routed_experts": "n_routed_experts",
        "num_shared_experts": "n_shared_experts",
        "num_dense_layers": "first_k_dense_replace",
        "num_mtp_layers": "num_nextn_predict_layers",
    }.get(key, key): value
    for key, value in OPENPANGU_ULTRA.items()
}


@dataclass(frozen=True)
class Case:
    """Model on a cluster, stage by stage; with `kept`, the model of these layers."""

    config: dict
    world_size: int
    stages: tuple[int, ...]
    kept: tuple[int, ...] | None = None
    sizes: dict = field(default_factory=dict)


def without(num_layers, *pruned):
    return tuple(layer for layer in range(num_layers) if layer not in pruned)


TP8_PP8_EP8 = dict(tensor=8, expert=8, sequence_parallel=True)
# openPangu lost 6 MoE and 2 dense layers in the paper; here, from both ends and between
PANGU_KEPT = without(61, 1, 2, 7, 20, 21, 22, 23, 59)
CASES = {
    "r1-tp8-pp8-ep8-on-64": Case(DEEPSEEK_R1, 64, (8, 8, 8, 8, 8, 8, 8, 5), sizes=TP8_PP8_EP8),
    "r1-pruned": Case(DEEPSEEK_R1, 64, (9, 7, 7, 7, 7, 7, 7, 2), without(61, 0, 2, *range(30, 36)), TP8_PP8_EP8),
    "r1-ep64-uneven-pp4-on-512": Case(DEEPSEEK_R1, 512, (13, 18, 17, 13), sizes=dict(expert=64)),
    "pangu-etp2": Case(
        OPENPANGU_ULTRA,
        64,
        (16, 16, 16, 13),
        sizes=dict(tensor=2, expert=8, expert_tensor=2, sequence_parallel=True),
    ),
    "pangu-pruned-vllm-spelling": Case(
        OPENPANGU_VLLM_SPELLING, 64, (27, 26), PANGU_KEPT, dict(tensor=4, expert=32, sequence_parallel=True)
    ),
    "glm-4.5-pruned": Case(
        GLM_4_5, 64, (20, 24, 24, 12), without(92, 1, *range(40, 51)), dict(tensor=8, expert=16, sequence_parallel=True)
    ),
    "minimax-m2-pruned": Case(
        MINIMAX_M2, 64, (27, 27), without(62, *range(30, 38)), dict(tensor=4, expert=32, sequence_parallel=True)
    ),
    "phi-4-pruned": Case(PHI_4, 4, (16, 16), without(40, *range(20, 28)), dict(tensor=2)),
    "olmo-3-32b-pruned": Case(
        OLMO_3_32B, 16, (25, 23), without(64, *range(24, 40)), dict(tensor=8, sequence_parallel=True)
    ),
    "qwen3-30b-a3b": Case(
        QWEN3_30B_A3B, 8, (26, 22), without(48, *range(1, 1)), dict(tensor=2, expert=4, sequence_parallel=True)
    ),
    "qwen3-30b-a3b-pruned": Case(QWEN3_30B_A3B, 16, (40,), without(48, *range(20, 28)), dict(expert=16)),
    "qwen3-32b": Case(QWEN3_32B, 16, (33, 31), sizes=dict(tensor=8, sequence_parallel=True)),
    "qwen3-32b-pruned": Case(QWEN3_32B, 8, (48,), without(64, *range(24, 40)), dict(tensor=8)),
    "qwen2.5-14b": Case(QWEN2_5_14B, 8, (24, 24), sizes=dict(tensor=4)),
    "qwen2.5-14b-pruned": Case(QWEN2_5_14B, 4, (24,), tuple(range(0, 48, 2)), dict(tensor=2)),
    "llama-2-7b": Case(LLAMA_2_7B, 8, (8, 9, 8, 7), sizes=dict(tensor=2)),
    "llama-2-7b-pruned": Case(LLAMA_2_7B, 2, (13,), (0, *range(20, 32)), dict(tensor=2)),
}
# Without multi-token prediction, as the makers state them; openPangu's makers say 718B.
TOTALS = {
    "deepseek_v3": 671_026_419_200,
    "pangu_ultra_moe": 719_093_767_680,
    "qwen3_moe": 30_532_122_624,
    "qwen3": 32_762_123_264,
    "qwen2": 14_770_033_664,
    "llama": 6_738_415_616,
}


@pytest.fixture(scope="module", params=CASES)
def built(request):
    """Case, its source as all ranks read it, and the parameters that all of them hold, each once."""
    parallel.leave()
    case = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "cat", cat_on_meta)  # torch's own takes a millisecond, and there are thousands
        return case, *read_on_every_rank(case)


def cat_on_meta(tensors, dim=0):
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return torch.empty(shape, device="meta")


def read_on_every_rank(case):
    source = PaperSource(case.config)
    sizes = ParallelSizes(pipeline=len(case.stages), **case.sizes)
    arch = source.family.architecture(case.config)
    check_parallel_sizes(arch, sizes, case.world_size)
    model_arch = arch if case.kept is None else arch.pruned(case.kept)
    rules, held = rules_by_parameter(source), 0
    ranks_per_stage = case.world_size // len(case.stages)
    for stage in range(len(case.stages)):
        # another place within each stage: what a rank holds does not depend on it but for the experts' numbers
        rank = stage * ranks_per_stage + stage % ranks_per_stage
        with simulated_rank(rank, case.world_size, sizes), device.on_meta():
            assert parallel_state.get_pipeline_model_parallel_rank() == stage
            model = build_model(model_arch, case.stages, EngineOptions(sizes, bf16=True))
            assert all(weight.is_meta for _, weight in model.named_weights())
        with simulated_rank(rank, case.world_size, sizes):
            for expert_rank in range(sizes.expert):
                parallel_state.set_expert_model_parallel_rank(expert_rank)
                for name, weight in model.named_weights():
                    rule = rules[source_name(name, case.kept)]
                    if rule.expert or expert_rank == 0:
                        held += read_on_holders(rule, weight, source, arch, sizes)
    return source, held


def read_on_holders(rule, weight, source, arch, sizes):
    """Read the parts of a parameter as all ranks that share it do, and return the number of elements that they hold."""
    size = sizes.expert_tensor if rule.expert else sizes.tensor
    holders = 1 if rule.shard is COPY else size
    for rank in range(holders):
        with torch.device("meta") if rule.shard is VOCAB else nullcontext():
            part = rule.read(source, arch, TensorParallel(rank, size))
        assert part.shape == weight.shape, rule.megatron
    padding = 0
    if rule.shard is VOCAB:
        padding = (padded_vocab_size(arch.vocab_size, size) - arch.vocab_size) * weight.shape[1]
    return holders * weight.numel() - padding


def stored_without_mtp(source):
    beyond = {*source.mtp_own(), *source.mtp_copies("model.embed_tokens.weight"), *source.mtp_copies("lm_head.weight")}
    return source.shapes.keys() - beyond


def test_every_element_of_the_checkpoint_is_read_once(built):
    case, source, _ = built
    names = stored_without_mtp(source)
    kept = range(source.num_layers) if case.kept is None else case.kept
    source.assert_read_once({name for name in names if source.renamed(name, kept) is not None})


def test_all_ranks_together_hold_the_model_once(built):
    case, source, held = built
    names = {name for name in stored_without_mtp(source) if name in source.reads}
    assert held == sum(math.prod(source.shapes[name]) for name in names) == model_size(case.config, case.kept).total
    if case.kept is None or len(case.kept) == source.num_layers:
        assert held == TOTALS[case.config["model_type"]]


def test_the_export_holds_what_its_config_says(built):
    """Names and shapes of the pruned model, MTP layers and all, follow from its own config.json."""
    case, source, _ = built
    kept = range(source.num_layers) if case.kept is None else case.kept
    exported = {source.renamed(name, kept): shape for name, shape in source.shapes.items()}
    exported.pop(None, None)
    assert exported == expected_tensors(source.family.prune_config(case.config, kept))


def test_the_checkpoint_is_one_that_a_run_takes(built):
    _, source, _ = built
    source.check_tensors()
    assert set(source.names) == expected_tensors(source.config).keys()


@pytest.mark.parametrize("config", [DEEPSEEK_R1, OPENPANGU_ULTRA, OPENPANGU_VLLM_SPELLING])
def test_mtp_layers_are_counted_apart(config):
    source = PaperSource(config)
    own = set(source.mtp_own())
    assert own and all(name.startswith("model.layers.61.") for name in own)
    assert expected_tensors(config).keys() - expected_tensors(config, mtp=False).keys() == own | {
        "model.layers.61.embed_tokens.weight",
        "model.layers.61.shared_head.head.weight",
    }


def test_all_ranks_of_a_small_cluster_build():
    config = LLAMA_2_7B
    source, sizes = PaperSource(config), ParallelSizes(tensor=2, pipeline=2)
    arch, counts = source.family.architecture(config), []
    for rank in range(8):
        with simulated_rank(rank, 8, sizes), device.on_meta():
            model = build_model(arch, [17, 15], EngineOptions(sizes))
            counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert len(set(counts[:4])) == len(set(counts[4:])) == 1
    norms = (2 * 32 + 1) * 4096
    padding = 2 * (32000 // 256 * 256 + 256 - 32000) % 256 * 4096
    assert 2 * (counts[0] + counts[4]) - norms - padding == TOTALS["llama"]
    assert torch.cuda.current_device() != torch.device("meta")
