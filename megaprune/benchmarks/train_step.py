"""The cost of search and recovery steps beside that of plain training, of the same model with random weights."""

import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaprune import device
from megaprune.benchmarks.options import TrainStepOptions
from megaprune.benchmarks.step_cases import Case, Memory, Sample, StepCases, cases
from megaprune.benchmarks.timing import Result, environment, interleaved, median_ratio
from megaprune.mcore import parallel
from megaprune.mcore.builder import EngineOptions, check_parallel_sizes
from megaprune.models import Architecture
from megaprune.models.gqa import GQA
from megaprune.utils.text import aligned


def measure(options: TrainStepOptions) -> Result:
    """Time the steps of all cases, interleaved, and measure their memory. Collective.

    Raises:
        UsageError: the options don't fit the processes.
    """
    arch, sizes = _architecture(options), parallel.ParallelSizes(tensor=options.tensor_model_parallel_size)
    check_parallel_sizes(arch, sizes, parallel.world_size())
    engine = EngineOptions(
        sizes, device.use_transformer_engine(options.transformer_impl), options.bf16, seq_length=options.seq_length
    )
    parallel.initialize(sizes)
    records = measure_steps(arch, engine, options.micro_batch_size, options.repeats, options.warmup)
    result: Result = {
        "benchmark": "train-step",
        "settings": asdict(options),
        "environment": environment(device.model_name(), parallel.world_size()),
        "cases": records,
    }
    parallel.finish()
    parallel.leave()
    return result


def table(result: Result) -> str:
    """Return the measured steps as a table for the terminal."""
    header = ("", "kept", "fwd+bwd s", "ratio", "ideal", "step s", "ratio", "tokens/s", "activations MiB", "ratio")
    rows = [header] + [
        (
            record["case"],
            str(record["kept_layers"]),
            f"{record['forward_backward_seconds']:.4f}",
            f"{record['forward_backward_ratio']:.3f}",
            f"{record['ideal_ratio']:.3f}",
            f"{record['step_seconds']:.4f}",
            f"{record['step_ratio']:.3f}",
            f"{record['tokens_per_second']:,.0f}",
            f"{record['activation_bytes'] / 2**20:,.1f}",
            f"{record['activation_ratio']:.3f}",
        )
        for record in result["cases"]
    ]
    if result["cases"][0]["peak_bytes"] is not None:
        peaks = ["peak MiB", *(f"{record['peak_bytes'] / 2**20:,.1f}" for record in result["cases"])]
        rows = [(*row, peak) for row, peak in zip(rows, peaks, strict=True)]
    lines = aligned(rows)
    machine = result["environment"]
    where = f"{machine['device']}, {machine['processes']} processes x {machine['threads']} threads"
    head = (
        f"medians of {result['settings']['repeats']} rounds on {where}; ratios are to plain, those beside a teacher to "
        "the same step with cross-entropy"
    )
    return "\n".join([head, *lines])


def measure_steps(
    arch: Architecture, engine: EngineOptions, micro_batch_size: int, repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """Time the steps of all cases, interleaved, then measure the memory of one more step of each. Collective.

    The steps are those of a run (`megaprune.pruning.step`) with one micro-batch: clear gradients, sample the mask, ask
    the teacher, forward, backward, reductions, update weights and scores. The loss is cross-entropy, or adaptive KL
    with a teacher. Recovery trains a model without a quarter of the layers.

    Args:
        arch: at least 4 layers, of which the first and the last are never masked.

    Returns:
        A record for each case, the same keys in each; ratios are to its baseline.
    """
    every = cases(arch.num_layers)
    with tempfile.TemporaryDirectory() as folder:
        setup = StepCases(arch, engine, micro_batch_size, repeats + warmup + 1, Path(folder))
        steps = {case.name: setup.stepper(case) for case in every}
        samples = interleaved({name: stepper.timed_step for name, stepper in steps.items()}, repeats, warmup)
        memory = {name: stepper.measure_memory() for name, stepper in steps.items()}
    tokens = micro_batch_size * engine.seq_length * parallel.data_parallel_size()
    return [_record(case, tokens, samples, memory) for case in every]


def _record(case: Case, tokens: int, samples: dict[str, list[Sample]], memory: dict[str, Memory]) -> dict[str, Any]:
    names = (case.name, case.baseline)
    step, baseline_step = ([sample.step for sample in samples[name]] for name in names)
    passes, baseline_passes = ([sample.forward_backward for sample in samples[name]] for name in names)
    return {
        "case": case.name,
        "baseline": case.baseline,
        "kept_layers": case.kept_layers,
        "forward_backward_seconds": statistics.median(passes),
        "step_seconds": statistics.median(step),
        "tokens_per_second": tokens / statistics.median(step),
        "forward_backward_ratio": median_ratio(passes, baseline_passes),
        "step_ratio": median_ratio(step, baseline_step),
        "ideal_ratio": case.ideal,
        "activation_bytes": memory[case.name].activations,
        "activation_ratio": memory[case.name].activations / memory[case.baseline].activations,
        "peak_bytes": memory[case.name].peak,
        "rounds": [asdict(sample) for sample in samples[case.name]],
    }


def _architecture(options: TrainStepOptions) -> Architecture:
    """A Qwen3-like model of the options' size."""
    heads = options.num_attention_heads
    groups = options.num_query_groups or (heads if heads % 2 else heads // 2)
    return Architecture(
        transformer=dict(
            num_layers=options.num_layers,
            hidden_size=options.hidden_size,
            ffn_hidden_size=options.ffn_hidden_size or 3 * options.hidden_size,
            num_attention_heads=heads,
            num_query_groups=groups,
            kv_channels=options.hidden_size // heads,
            layernorm_epsilon=1e-6,
            qk_layernorm=True,
        ),
        attention=GQA,
        vocab_size=options.vocab_size,
        max_position_embeddings=options.seq_length,
        rotary_base=1e4,
    )
