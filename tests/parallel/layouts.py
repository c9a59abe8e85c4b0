"""The parallel layouts under test."""

from tests.helpers import tiny

TP2, PP2, SP = {"tensor": 2}, {"pipeline": 2}, {"sequence_parallel": True}
MODEL_LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2 | SP),
    "pp2": (2, PP2),
    "tp2_sp_pp2": (4, TP2 | PP2 | SP),
}
MOE_FAMILIES = (*tiny.MOE_FAMILIES, "pangu_ultra_moe")
_EP2 = {"expert": 2}
MOE_LAYOUTS = {
    "ep2": (2, _EP2),
    "tp2_sp": (2, TP2 | SP),
    "tp2_sp_ep2": (2, TP2 | SP | _EP2),
    "tp2_etp2": (2, TP2 | {"expert_tensor": 2}),
    "pp2": (2, PP2),
    "tp2_sp_pp2_ep2": (4, TP2 | SP | PP2 | _EP2),
}
# Families that share their attention and MLPs with those that run at every layout.
_FEWER_LAYOUTS = {name: MODEL_LAYOUTS[name] for name in ("tp2_sp", "pp2")}
_FEWER_MOE_LAYOUTS = {name: MOE_LAYOUTS[name] for name in ("tp2_sp", "pp2", "ep2")}
_EVERYWHERE = {"llama2", "llama3", "llama_tied", "qwen2", "qwen3", "qwen3_tied"}
_EVERYWHERE |= {"deepseek_v3", "qwen3_moe", "pangu_ultra_moe"}
# of models with another stored layout than the tables
STORED_LAYOUTS = {
    "deepseek_v3_stacked": {name: MOE_LAYOUTS[name] for name in ("tp2_sp_ep2", "pp2")},
    "qwen3_moe_stacked": {name: MOE_LAYOUTS[name] for name in ("ep2", "tp2_etp2")},
    "qwen3_tied_bare": {"tp2": MODEL_LAYOUTS["tp2"]},
    "qwen3_tied_untied": {name: MODEL_LAYOUTS[name] for name in ("tp2_sp", "pp2")},
    "llama_tied_twice": {"tp2": MODEL_LAYOUTS["tp2"]},
    "qwen2_as_output": {"pp2": MODEL_LAYOUTS["pp2"]},
}
# data parallelism uses the remaining processes
STEP_LAYOUTS = MODEL_LAYOUTS | {
    "dp2": (2, {}),
    "tp2_dp2": (4, TP2),
    "tp2_sp_dp2": (4, TP2 | SP),
    "pp2_dp2": (4, PP2),
}
# Losses of recovery: processes, sizes, layers of the teacher and of the student on each stage, and recomputation. The
# kept layers are those of loss_cases, so that hidden states travel to the earlier stage, to the later one, or past one.
HIDDEN_LAYOUTS = {
    "tp2": (2, TP2, [7], [4], None),
    "tp2_sp": (2, TP2 | SP, [7], [4], "full"),
    "dp2": (2, {}, [7], [4], None),
    "pp2_to_the_first": (2, PP2, [2, 5], [3, 1], "full"),
    "pp2_to_the_last": (2, PP2, [6, 1], [1, 3], None),
    "pp4": (4, {"pipeline": 4}, [1, 1, 1, 4], [1, 1, 1, 1], None),
    "tp2_sp_pp2": (4, TP2 | SP | PP2, [2, 5], [2, 2], None),
    "pp2_dp2": (4, PP2, [6, 1], [2, 2], None),
}
# Families whose layers are built of other modules, with full recomputation.
FULL_TRAINING = {
    f"{family}-{layout}": (family, sizes)
    for family in ("llama_biased", "ministral3", "olmo3", "gemma3", "minimax_m2", "glm4_moe", "gpt_oss")
    for layout, sizes in (("tp2_sp", TP2 | SP), ("pp2", PP2))
}
# biases of experts, which tensor-parallel ranks share or divide
FULL_TRAINING["gpt_oss-tp2_sp_ep2"] = ("gpt_oss", MOE_LAYOUTS["tp2_sp_ep2"][1])
MTP_LAYOUTS = {
    "tp2_sp": (2, TP2 | SP, [5], [3], "full"),
    "ep2": (2, _EP2, [5], [3], None),
    "pp2": (2, PP2, [2, 3], [2, 1], None),
    "tp2_sp_pp2_ep2": (4, TP2 | SP | PP2 | _EP2, [4, 1], [1, 2], "full"),
}

_TP2 = ("--tensor-model-parallel-size", "2")
_PP2 = ("--pipeline-model-parallel-size", "2")
_SP, _DISTRIBUTED, _OVERLAP = "--sequence-parallel", "--use-distributed-optimizer", "--overlap-grad-reduce"


def model_layouts(family: str) -> dict[str, tuple[int, dict]]:
    """Return the layouts, with their numbers of processes, at which a family's model is computed."""
    if family in _EVERYWHERE:
        return MOE_LAYOUTS if family in MOE_FAMILIES else MODEL_LAYOUTS
    return _FEWER_MOE_LAYOUTS if family in MOE_FAMILIES else _FEWER_LAYOUTS


RUN_LAYOUTS = {
    "tp2": (2, _TP2),
    "pp2": (2, _PP2),
    "pp2_recompute": (2, (*_PP2, "--recompute-granularity", "full")),
    "dp2": (2, (_OVERLAP, "--override", "ddp.bucket_size=5000")),
    "dp2_distributed": (2, (_DISTRIBUTED, _OVERLAP)),
    "tp2_sp_pp2_distributed": (4, (*_TP2, *_PP2, _SP, _DISTRIBUTED)),
    "tp2_sp_dp2_distributed": (4, (*_TP2, _SP, _DISTRIBUTED)),
}
FREED_LAYOUTS = {"tp2_sp": (*_TP2, _SP, "--bf16"), "dp2_distributed": (_DISTRIBUTED,)}
# calibrated methods, and their flags
SELECTING = {"auto": ("--stitch", "fold"), "quadratic": (), "shortgpt": (), "sleb": ()}
SELECT_LAYOUTS = {"tp2_sp": (*_TP2, _SP), "pp2": _PP2, "dp2": ()}
# endpoint tuning after CLP's search; at PP 2 a stage may hold no trained parameters
ENDPOINT_LAYOUTS = {"endpoints_tp2_sp": (*_TP2, _SP), "endpoints_pp2": _PP2, "endpoints_dp2": (_DISTRIBUTED,)}
SHEARED_LAYOUTS = {"sheared_tp2_sp": (*_TP2, _SP)}
# a stitch over two cuts; at PP 2 the layers on both sides of the first are on different stages
STITCH_LAYOUTS = {
    "stitch_tp2_sp": ("qwen3_tied", "2,3,5", (*_TP2, _SP)),
    "stitch_pp2": ("qwen3_tied", "2,3,4,6", _PP2),
    "stitch_dp2": ("qwen3_tied", "2,3,5", ()),
    "stitch_moe_tp2_sp": ("deepseek_v3", "1,4", (*_TP2, _SP, "--expert-tensor-parallel-size", "1")),
    "stitch_moe_ep2": ("deepseek_v3", "1,4", ("--expert-model-parallel-size", "2")),
}
HEALED_LAYOUTS = {"healed_pp2": _PP2, "healed_tp2_sp": (*_TP2, _SP, _DISTRIBUTED)}
ROUNDS_LAYOUTS = {"rounds_pp2": _PP2, "rounds_tp2_sp": (*_TP2, _SP, _DISTRIBUTED)}
# at which Megatron-Core loads an imported checkpoint
LOAD_LAYOUTS = {
    "dense_tp2": ("qwen3_tied", TP2),
    "dense_pp2": ("qwen2", PP2),
    "norms_over_heads_tp2": ("olmo3", TP2),
    "biases_tp2": ("llama_biased", TP2),
    "fused_tp2": ("phi3", TP2),
    "moe_tp2_sp_ep2": ("deepseek_v3", TP2 | SP | _EP2),
    "moe_etp2": ("qwen3_moe", TP2 | {"expert_tensor": 2}),
    "moe_pp2": ("pangu_ultra_moe", PP2),
    "moe_biases_tp2_sp_ep2": ("gpt_oss", TP2 | SP | _EP2),
}
MOE_RUN_LAYOUTS = {
    "moe_ep2": (
        2,
        ("--expert-model-parallel-size", "2", _DISTRIBUTED, "--moe-token-dispatcher-type", "allgather", _OVERLAP),
    ),
    "moe_tp2_sp": (2, (*_TP2, _SP, "--expert-tensor-parallel-size", "1")),
    "moe_pp2": (2, _PP2),
}
# Each part's flags, and its number of iterations: it stops in the search, in recovery, and not at all.
INTERRUPTED_RUNS = {
    "same_layout": [((_DISTRIBUTED,), 4), ((_DISTRIBUTED,), 9), ((_DISTRIBUTED,), None)],
    "other_layouts": [(_TP2, 4), ((), 9), (_PP2, None)],
    "other_layouts_distributed": [((*_PP2, _DISTRIBUTED), 4), ((_DISTRIBUTED,), 9), ((*_TP2, _SP, _DISTRIBUTED), None)],
}
