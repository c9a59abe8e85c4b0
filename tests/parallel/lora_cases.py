"""LoRA runs on any number of processes."""

import hashlib
from collections import defaultdict
from typing import Any

import torch.distributed as dist

from megaprune.mcore.layers.lora import adapted_layers
from megaprune.mcore.optimizer import Trainer
from megaprune.mcore.pipeline_model import PipelineModel
from tests.helpers import tiny

_TP2, _PP2 = ("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "2")
_TP2_SP, _EP2 = (*_TP2, "--sequence-parallel"), ("--expert-model-parallel-size", "2")
_ETP1, _ETP2 = (("--expert-tensor-parallel-size", size) for size in "12")
_DISTRIBUTED = "--use-distributed-optimizer"
# Family, processes and flags of each run, which is compared with the same run on one process.
LAYOUTS = {
    "dense_tp2": ("qwen3_tied", 2, _TP2),
    "dense_pp2": ("qwen3_tied", 2, _PP2),
    "tp2_sp_etp2": ("deepseek_v3", 2, (*_TP2_SP, *_ETP2)),
    "tp2_sp_etp1": ("deepseek_v3", 2, (*_TP2_SP, *_ETP1)),
    "tp2_sp_ep2": ("deepseek_v3", 2, (*_TP2_SP, *_EP2, *_ETP1)),
    "ep2": ("deepseek_v3", 2, (*_EP2, _DISTRIBUTED)),
    "etp2": ("deepseek_v3", 2, _ETP2),
    "pp2_recompute": ("deepseek_v3", 2, (*_PP2, "--recompute-granularity", "full")),
    "tp2_sp_pp2_ep2_adapter": ("deepseek_v3", 4, (*_TP2_SP, *_PP2, *_EP2, "--export-adapter")),
    "glm4_moe_pp2_ep2": ("glm4_moe", 4, (*_PP2, *_EP2)),
    "minimax_m2_pp2_ep2": ("minimax_m2", 4, (*_PP2, *_EP2)),
    "tp2_sp_dp2_etp2": ("deepseek_v3", 4, (*_TP2_SP, *_ETP2, _DISTRIBUTED)),
}


def argv(model: Any, data: Any, save: Any, *extra: str) -> list[str]:
    """Return the flags of a small run with LoRA and the self teacher, half search and half recovery."""
    flags = ("--train-iters", "6", "--search-iters", "3", "--lr", "1e-2", "--lr-warmup-iters", "1", "--teacher", "self")
    return tiny.prune_argv(model, data, save, *flags, "--lora-rank", "4", "--lora-alpha", "8", *extra)


def prune(argv: list[str]) -> None:
    """Complete a run. Fail if ranks differ after a step in a value of the adapters that they share."""
    step = Trainer.step

    def checked_step(self: Trainer, iteration: int) -> Any:
        done = step(self, iteration)
        _check_copies(self.model)
        return done

    Trainer.step = checked_step
    try:
        tiny.run_here(argv)
    finally:
        Trainer.step = step


def _check_copies(model: PipelineModel) -> None:
    """Check that ranks that hold the same adapter, or the same shard of it, hold the same bits."""
    held = {}
    for name, layer in adapted_layers(model).items():
        for which, cut in (("lora_a", layer.cut_a), ("lora_b", not layer.cut_a)):
            shard = layer.tp_group.rank() if cut else "whole"
            data = getattr(layer, which).detach().float().numpy().tobytes()
            held[name, which, shard] = hashlib.sha256(data).hexdigest()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    digests = defaultdict(set)
    for rank in everyone:
        for key, digest in rank.items():
            digests[key].add(digest)
    assert [key for key, found in digests.items() if len(found) > 1] == []
