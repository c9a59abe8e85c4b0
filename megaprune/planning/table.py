"""Output of a plan: text for the terminal, and plain data for JSON."""

from dataclasses import asdict
from typing import Any

from megaprune.planning.plan import Phase, Plan, Stage
from megaprune.utils.text import number_ranges

_GIB = 2**30
_NOT_COUNTED = (
    "not counted: the CUDA context, communication buffers, fragmentation and uneven routing (leave a tenth free).\n"
    "Layers are Megatron-Core's local ones: Transformer Engine's keep fewer activations. Adam is a fused one: "
    "torch's own takes 4 more bytes for each trained parameter while it steps."
)


def unfit(plan: Plan, device_bytes: float) -> list[tuple[Phase, list[Stage]]]:
    """Return the phases that do not fit, each with the stages whose ranks need more memory than a device has."""
    found = [(phase, [stage for stage in phase.stages if stage.memory.total > device_bytes]) for phase in plan.phases]
    return [(phase, stages) for phase, stages in found if stages]


def plan_text(plan: Plan, device_memory_gib: float | None) -> str:
    """Return the plan as text: a few lines, and a table for each phase."""
    lines = [*_heading(plan)]
    for phase in plan.phases:
        lines += ["", *_phase_lines(phase, device_memory_gib)]
    if len(plan.phases) > 1:
        before, after = plan.phases[0], plan.phases[-1]
        lines += ["", f"balance     dearest stage by the mean: {before.imbalance:.3f} before pruning, "]
        lines[-1] += f"{after.imbalance:.3f} after"
    lines += ["", *_fit_lines(plan, device_memory_gib), _NOT_COUNTED]
    return "\n".join(lines)


def plan_record(plan: Plan, device_memory_gib: float | None) -> dict[str, Any]:
    """Return the plan as plain data. Memory is in bytes, costs are in multiply-adds per token."""
    cluster = plan.cluster
    iterations = plan.config.recovery.train_iters
    return {
        "hf_model": plan.config.model.given,
        "model_type": plan.model_type,
        "world_size": cluster.world_size,
        "parallel": asdict(cluster.sizes)
        | {"data": cluster.data_parallel, "expert_data": cluster.expert_data_parallel},
        "micro_batch_size": cluster.micro_batch_size,
        "global_batch_size": cluster.global_batch_size,
        "micro_batches": cluster.micro_batches,
        "pipeline_bubble": cluster.bubble,
        "tokens_per_iteration": cluster.tokens_per_iteration,
        "train_iters": iterations,
        "search_iters": plan.config.search_iters if iterations else None,
        "tokens": None if iterations is None else iterations * cluster.tokens_per_iteration,
        "lora": asdict(plan.lora) if plan.lora else None,
        "teacher": plan.teacher,
        "phases": [_phase_record(phase) for phase in plan.phases],
        "device_memory_gib": device_memory_gib,
        "fits": None if device_memory_gib is None else not unfit(plan, device_memory_gib * _GIB),
    }


def _phase_record(phase: Phase) -> dict[str, Any]:
    stages = []
    for stage in phase.stages:
        record = asdict(stage)
        record["memory"]["total"] = stage.memory.total
        stages.append(record)
    return {
        "name": phase.name,
        "kept_layers": phase.kept_layers,
        "assumed": phase.assumed,
        "parameters": phase.size.total,
        "active_parameters": phase.size.active,
        "imbalance": phase.imbalance,
        "stages": stages,
    }


def _heading(plan: Plan) -> list[str]:
    cluster, sizes, config, before = plan.cluster, plan.cluster.sizes, plan.config, plan.phases[0]
    experts = ""
    if any(stage.moe_layers for stage in before.stages):
        experts = f"; experts: EP {sizes.expert} x ETP {sizes.expert_tensor} x DP {cluster.expert_data_parallel}"
    lines = [
        f"model       {config.model.given} ({plan.model_type}): {_layers(before)}, {_sizes(before)}",
        f"processes   {cluster.world_size}: TP {sizes.tensor}{' with SP' if sizes.sequence_parallel else ''} x "
        f"PP {sizes.pipeline} x DP {cluster.data_parallel}{experts}",
        f"iteration   {cluster.tokens_per_iteration:,} tokens: {cluster.global_batch_size} windows of "
        f"{cluster.seq_length:,}; micro-batches a replica: {cluster.micro_batches}; bubble {cluster.bubble:.0%}",
        f"training    {_training(plan)}",
    ]
    return lines


def _training(plan: Plan) -> str:
    config, cluster = plan.config, plan.cluster
    iterations = config.recovery.train_iters
    if iterations == 0:
        return "none"
    parts = ["bf16 with fp32 optimizer state" if config.recovery.bf16 else "fp32"]
    if iterations is not None:
        searching = f" ({config.search_iters:,} of them search)" if len(plan.phases) > 1 and config.search_iters else ""
        parts.append(f"{iterations:,} iterations{searching}, {iterations * cluster.tokens_per_iteration:,} tokens")
    parts.append(f"LoRA of rank {plan.lora.rank}" if plan.lora else "all weights")
    parts.append(f"teacher: {plan.teacher or 'none'}")
    if config.engine.recompute_granularity:
        parts.append(f"{config.engine.recompute_granularity} recompute")
    return "; ".join(parts)


def _phase_lines(phase: Phase, device_memory_gib: float | None) -> list[str]:
    title = f"{phase.name}: {_layers(phase)}, {_sizes(phase)}"
    lines = [title + (f" (assumed: {phase.assumed})" if phase.assumed else "")]
    unit, name = (_GIB, "GiB") if max(stage.memory.total for stage in phase.stages) >= _GIB else (2**20, "MiB")
    header: tuple[str, ...] = (
        "stage",
        "ranks",
        "layers",
        "dense+MoE",
        "parameters",
        "trained",
        "weights",
        "gradients",
        "optimizer",
    )
    header += ("teacher", "activations", "working", f"total {name}", "cost")
    mean = sum(stage.cost for stage in phase.stages) / len(phase.stages)
    rows = [header]
    for number, stage in enumerate(phase.stages):
        memory = stage.memory
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.teacher, memory.activations, memory.working)
        row = [
            str(number),
            _ranks(stage),
            number_ranges(stage.running_layers, ","),
            f"{stage.dense_layers}+{stage.moe_layers}",
            f"{stage.parameters:,}",
            f"{stage.trained_parameters:,}",
            *(f"{part / unit:.2f}" for part in (*parts, memory.total)),
            f"{stage.cost / mean:.3f}",
        ]
        if device_memory_gib is not None and memory.total > device_memory_gib * _GIB:
            row[-1] += "  DOES NOT FIT"
        rows.append(tuple(row))
    widths = [max(len(row[column].removesuffix("  DOES NOT FIT")) for row in rows) for column in range(len(header))]
    return lines + ["  ".join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _padded(cell: str, width: int) -> str:
    number, mark, _ = cell.partition("  DOES NOT FIT")
    return number.rjust(width) + mark


def _fit_lines(plan: Plan, device_memory_gib: float | None) -> list[str]:
    if device_memory_gib is None:
        return []
    found = unfit(plan, device_memory_gib * _GIB)
    if not found:
        return [f"fits        every rank, in {device_memory_gib:g} GiB"]
    lines = []
    for phase, stages in found:
        fullest = max(stages, key=lambda stage: stage.memory.total)
        numbers = number_ranges((number for number, stage in enumerate(phase.stages) if stage in stages), ",")
        lines.append(
            f"does not fit in {device_memory_gib:g} GiB: {phase.name}, stages {numbers}; the fullest needs "
            f"{fullest.memory.total / _GIB:,.1f} GiB on each rank of {_ranks(fullest)}"
        )
    return lines


def _ranks(stage: Stage) -> str:
    return number_ranges(range(stage.first_rank, stage.last_rank + 1), ",")


def _layers(phase: Phase) -> str:
    dense = sum(stage.dense_layers for stage in phase.stages)
    moe = sum(stage.moe_layers for stage in phase.stages)
    kinds = f" ({dense} dense, {moe} MoE)" if moe else ""
    return f"{len(phase.kept_layers)} layers{kinds}"


def _sizes(phase: Phase) -> str:
    active = f", {phase.size.active:,} of them active for a token" if phase.size.active != phase.size.total else ""
    return f"{phase.size.total:,} parameters{active}"
