"""Output of a plan: text for the terminal, and plain data for JSON."""

from dataclasses import asdict
from typing import Any

from megaprune.planning.memory import CONTEXT_BYTES, FRAGMENTATION, GROUP_BYTES, Memory
from megaprune.planning.plan import Moment, Phase, Plan, Stage
from megaprune.utils.text import number_ranges

_GIB = 2**30
# Marks of the stages of a phase, and of other moments, that need more memory than a device has.
_UNFIT, _TOO_MUCH = "  DOES NOT FIT", "  too much"
_MOMENTS = {
    "importance": "importance passes",
    "transition": "pruned student is built",
    "saving": "checkpoint is saved",
}
_MARGIN = (
    f"margin      {CONTEXT_BYTES / _GIB:g} GiB for the CUDA context and workspaces, {GROUP_BYTES / _GIB:g} GiB for "
    "each of {groups} communicators of NCCL,\n"
    f"            and {FRAGMENTATION:.0%} of the tensors for fragmentation; none of these has been measured"
)
_NOT_COUNTED = (
    "not counted: uneven routing of tokens to experts. The estimate is for Megatron-Core's local layers; Transformer\n"
    "Engine's keep fewer activations. It assumes a fused Adam; torch's own needs 4 more bytes per trained parameter\n"
    "during a step."
)


def unfit(plan: Plan, device_bytes: float) -> list[tuple[Phase, list[Stage]]]:
    """Return the phases that do not fit, each with the stages whose ranks need more memory than a device has."""
    found = [(phase, [stage for stage in phase.stages if stage.memory.total > device_bytes]) for phase in plan.phases]
    return [(phase, stages) for phase, stages in found if stages]


def unfit_moments(plan: Plan, device_bytes: float) -> list[Moment]:
    """Return the moments in which a rank needs more memory than a device has."""
    return [each for each in plan.moments if max(memory.total for memory in each.memory) > device_bytes]


def plan_text(plan: Plan, device_memory_gib: float | None) -> str:
    """Return the plan as text: a few lines, and a table for each phase."""
    lines = [*_heading(plan)]
    for phase in plan.phases:
        lines += ["", *_phase_lines(phase, device_memory_gib)]
    if plan.moments:
        lines += ["", *_moment_lines(plan, device_memory_gib)]
    if len(plan.phases) > 1:
        before, after = plan.phases[0], plan.phases[-1]
        lines += ["", f"balance     most expensive stage relative to the mean: {before.imbalance:.3f} before pruning, "]
        lines[-1] += f"{after.imbalance:.3f} after"
    margin = _MARGIN.format(groups=plan.cluster.groups)
    lines += ["", *_disk_lines(plan), *_fit_lines(plan, device_memory_gib), margin, _NOT_COUNTED]
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
        "moments": [
            {"name": each.name, "stages": [asdict(memory) | {"total": memory.total} for memory in each.memory]}
            for each in plan.moments
        ],
        "disk": None if plan.disk is None else asdict(plan.disk),
        "device_memory_gib": device_memory_gib,
        "fits": None if device_memory_gib is None else _fits(plan, device_memory_gib * _GIB),
    }


def _fits(plan: Plan, device_bytes: float) -> bool:
    return not unfit(plan, device_bytes) and not unfit_moments(plan, device_bytes)


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
    header += ("teacher", "activations", "working", "margin", f"total {name}", "cost")
    mean = sum(stage.cost for stage in phase.stages) / len(phase.stages)
    rows = [header]
    for number, stage in enumerate(phase.stages):
        memory = stage.memory
        parts = _parts(memory)
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
            row[-1] += _UNFIT
        rows.append(tuple(row))
    return lines + _aligned(rows)


def _moment_lines(plan: Plan, device_memory_gib: float | None) -> list[str]:
    """Return a table with the fullest stage of each moment."""
    largest = max(memory.total for each in plan.moments for memory in each.memory)
    unit, name = (_GIB, "GiB") if largest >= _GIB else (2**20, "MiB")
    header = ("", "stage", "weights", "gradients", "optimizer", "teacher", "activations", "working", "margin")
    rows: list[tuple[str, ...]] = [(*header, f"total {name}")]
    for each in plan.moments:
        stage = max(range(len(each.memory)), key=lambda number: each.memory[number].total)  # noqa: B023
        memory = each.memory[stage]
        row = [_MOMENTS[each.name], str(stage), *(f"{part / unit:.2f}" for part in (*_parts(memory), memory.total))]
        if device_memory_gib is not None and memory.total > device_memory_gib * _GIB:
            row[-1] += _TOO_MUCH
        rows.append(tuple(row))
    return ["other moments, of each the fullest stage:", *_aligned(rows)]


def _parts(memory: Memory) -> tuple[int, ...]:
    """Return the components, in the order of the columns."""
    held = (memory.weights, memory.gradients, memory.optimizer, memory.teacher)
    return (*held, memory.activations, memory.working, memory.margin)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(_marked(row[column])[0]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(_padded(cell, width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _marked(cell: str) -> tuple[str, str]:
    """Return the text of a cell and its mark, if it has one."""
    mark = next((mark for mark in (_UNFIT, _TOO_MUCH) if cell.endswith(mark)), "")
    return cell.removesuffix(mark), mark


def _disk_lines(plan: Plan) -> list[str]:
    if plan.disk is None:
        return []
    size, count = plan.disk.checkpoint, plan.disk.at_once
    unit, name = (_GIB, "GiB") if size >= _GIB else (2**20, "MiB")
    together = f"up to {count} at once: {count * size / unit:,.1f} {name}"
    return [f"disk        checkpoints of {size / unit:,.1f} {name}, {together}"]


def _padded(cell: str, width: int) -> str:
    number, mark = _marked(cell)
    return number.rjust(width) + mark


def _fit_lines(plan: Plan, device_memory_gib: float | None) -> list[str]:
    if device_memory_gib is None:
        return []
    found, moments = unfit(plan, device_memory_gib * _GIB), unfit_moments(plan, device_memory_gib * _GIB)
    if not found and not moments:
        return [f"fits        every rank, in {device_memory_gib:g} GiB"]
    lines = []
    for phase, stages in found:
        fullest = max(stages, key=lambda stage: stage.memory.total)
        numbers = number_ranges((number for number, stage in enumerate(phase.stages) if stage in stages), ",")
        lines.append(
            f"does not fit in {device_memory_gib:g} GiB: {phase.name}, stages {numbers}; the fullest needs "
            f"{fullest.memory.total / _GIB:,.1f} GiB on each rank of {_ranks(fullest)}"
        )
    for each in moments:
        largest = max(memory.total for memory in each.memory)
        lines.append(f"does not fit in {device_memory_gib:g} GiB: {each.name}, which needs {largest / _GIB:,.1f} GiB")
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
