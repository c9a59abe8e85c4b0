"""Speed of each stage of training, from the records of its steps."""

from collections.abc import Mapping, Sequence
from typing import Any

# The entries of a step's record that are measurements of time and memory, and differ when a run is repeated.
MEASURED = frozenset(
    {
        "seconds",
        "tflops",
        "mfu",
        "compute_seconds",
        "teacher_seconds",
        "data_seconds",
        "memory_gib",
        "compute_seconds_min",
        "compute_seconds_max",
        "slowest_rank",
        "teacher_seconds_max",
        "data_seconds_max",
        "memory_gib_max",
    }
)
_MEANS = ("tflops", "mfu", "compute_seconds", "teacher_seconds", "data_seconds")


def with_performance(
    stages: Mapping[str, Mapping[str, float]], records: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Return the stages of a report with the speed of those that train.

    Args:
        stages: seconds and tokens of each stage.
        records: of the run's steps.

    Returns:
        Each stage; those with steps also have the means per step of `tflops` (per GPU), `mfu` (where the device's peak
        is known), `compute_seconds`, `teacher_seconds` and `data_seconds` of rank 0, and the highest `memory_gib` of
        all ranks.
    """
    found = {name: dict(spent) for name, spent in stages.items()}
    for name, spent in found.items():
        steps = [record for record in records if record["stage"] == name and "tflops" in record]
        for entry in _MEANS:
            values = [step[entry] for step in steps if step.get(entry) is not None]
            if values:
                spent[entry] = sum(values) / len(values)
        if steps:
            spent["memory_gib"] = max(step.get("memory_gib_max", step["memory_gib"]) for step in steps)
    return found


def speed_text(record: Mapping[str, Any]) -> str:
    """Return the speed in a step's record for a log line; empty if the record has none.

    Measures over all ranks are in the records at the ends of log intervals.
    """
    if "tflops" not in record:
        return ""
    mfu = f" ({record['mfu']:.1%} MFU)" if "mfu" in record else ""
    parts = [f"{record['tflops']:.1f} TFLOP/s per device{mfu}"]
    parts.append(f"teacher {record['teacher_seconds']:.2f} s, data {record['data_seconds']:.2f} s")
    parts.append(f"memory {record.get('memory_gib_max', record['memory_gib']):.1f} GiB")
    least, most = record.get("compute_seconds_min"), record.get("compute_seconds_max")
    if least is not None and most is not None and record["slowest_rank"] is not None:
        parts.append(f"compute {least:.2f} to {most:.2f} s, slowest rank {record['slowest_rank']}")
    return " | " + " | ".join(parts)
