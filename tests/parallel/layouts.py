"""The parallel layouts under test."""

TP2, PP2 = {"tensor": 2}, {"pipeline": 2}
MODEL_LAYOUTS = {
    "tp2": (2, TP2),
    "tp2_sp": (2, TP2 | {"sequence_parallel": True}),
    "pp2": (2, PP2),
    "tp2_sp_pp2": (4, TP2 | PP2 | {"sequence_parallel": True}),
}
# data parallelism takes what is left of the processes
STEP_LAYOUTS = MODEL_LAYOUTS | {
    "dp2": (2, {}),
    "tp2_dp2": (4, TP2),
    "tp2_sp_dp2": (4, TP2 | {"sequence_parallel": True}),
    "pp2_dp2": (4, PP2),
}

_TP2 = ("--tensor-model-parallel-size", "2")
_PP2 = ("--pipeline-model-parallel-size", "2")
_SP, _DISTRIBUTED = "--sequence-parallel", "--use-distributed-optimizer"
RUN_LAYOUTS = {
    "tp2": (2, _TP2),
    "pp2": (2, _PP2),
    "pp2_recompute": (2, (*_PP2, "--recompute-granularity", "full")),
    "dp2": (2, ()),
    "dp2_distributed": (2, (_DISTRIBUTED,)),
    "tp2_sp_pp2_distributed": (4, (*_TP2, *_PP2, _SP, _DISTRIBUTED)),
    "tp2_sp_dp2_distributed": (4, (*_TP2, _SP, _DISTRIBUTED)),
}
# Each go's flags, and after how many of its iterations it is stopped: in the search, in recovery, and not at all.
INTERRUPTED_RUNS = {
    "same_layout": [((_DISTRIBUTED,), 4), ((_DISTRIBUTED,), 9), ((_DISTRIBUTED,), None)],
    "other_layouts": [(_TP2, 4), ((), 9), (_PP2, None)],
    "other_layouts_distributed": [((*_PP2, _DISTRIBUTED), 4), ((_DISTRIBUTED,), 9), ((*_TP2, _SP, _DISTRIBUTED), None)],
}
