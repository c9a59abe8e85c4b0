"""The verb `benchmark`: speed ratios, each measured side by side in one run. A sub-verb for each."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from megaprune.cli.parser import parse_flags
from megaprune.config.fields import flag
from megaprune.models import Architecture
from megaprune.models.gqa import GQA
from megaprune.report.run_report import versions
from megaprune.utils.errors import UsageError
from megaprune.utils.files import write_json
from megaprune.utils.text import aligned

Result = dict[str, Any]


@dataclass
class TrainStepConfig:
    """The flags of `benchmark train-step`: a dense model with random weights, and how often to step."""

    num_layers: int = flag("layers of the model, at least 4", 16)
    hidden_size: int = flag("hidden size", 512)
    ffn_hidden_size: int | None = flag("columns of the MLP (default: 3 x the hidden size)")
    num_attention_heads: int = flag("attention heads", 8)
    num_query_groups: int | None = flag("key-value heads (default: half of the attention heads, if that is whole)")
    vocab_size: int = flag("vocabulary; small, so that the layers decide the time", 2048)
    seq_length: int = flag("tokens in a window", 256)
    micro_batch_size: int = flag("windows in a step of one replica", 4)
    repeats: int = flag("steps of each kind that are measured", 10)
    warmup: int = flag("steps of each kind before them", 2)
    tensor_model_parallel_size: int = flag("tensor-parallel ranks", 1)
    bf16: bool = flag("train in bf16 (default: fp32)", False)
    transformer_impl: Literal["auto", "transformer_engine", "local"] = flag("layer implementation", "auto")
    output: str | None = flag("write the results to this JSON file")

    def architecture(self) -> Architecture:
        """A Qwen3-like model of this size."""
        heads = self.num_attention_heads
        groups = self.num_query_groups or (heads if heads % 2 else heads // 2)
        return Architecture(
            transformer=dict(
                num_layers=self.num_layers,
                hidden_size=self.hidden_size,
                ffn_hidden_size=self.ffn_hidden_size or 3 * self.hidden_size,
                num_attention_heads=heads,
                num_query_groups=groups,
                kv_channels=self.hidden_size // heads,
                layernorm_epsilon=1e-6,
                qk_layernorm=True,
            ),
            attention=GQA,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.seq_length,
            rotary_base=1e4,
        )


def train_step_benchmark(argv: Sequence[str]) -> Result:
    """``benchmark train-step``: a search step at several masks, by a plain training step. Collective.

    Raises:
        UsageError: flags that don't fit each other or the processes.
    """
    config = _parse(TrainStepConfig, argv, "train-step", "The cost of a search step by that of a plain training step.")
    _check_train_step(config)
    # Imported here, so that --help and wrong flags don't wait for megatron.
    from megaprune import device
    from megaprune.benchmarks.train_step import measure_steps
    from megaprune.mcore import parallel
    from megaprune.mcore.builder import EngineOptions, check_parallel_sizes

    arch, sizes = config.architecture(), parallel.ParallelSizes(tensor=config.tensor_model_parallel_size)
    check_parallel_sizes(arch, sizes, parallel.world_size())
    engine = EngineOptions(
        sizes, device.use_transformer_engine(config.transformer_impl), config.bf16, seq_length=config.seq_length
    )
    parallel.initialize(sizes)
    records = measure_steps(arch, engine, config.micro_batch_size, config.repeats, config.warmup)
    result = {
        "benchmark": "train-step",
        "settings": asdict(config),
        "environment": _environment(device.NAME, parallel.world_size()),
        "cases": records,
    }
    if parallel.rank() == 0:
        print(train_step_table(result), flush=True)
        _write(config.output, result)
    parallel.finish()
    parallel.leave()
    return result


@dataclass
class ConvertConfig:
    """The flags of `benchmark convert`: a synthetic checkpoint, and how often to convert it."""

    size_gb: float = flag("size of the bf16 checkpoint, in LLaMA's shape", 4.0)
    hidden_size: int = flag("hidden size, a multiple of 512", 4096)
    repeats: int = flag("rounds", 3)
    transformers: bool = flag("measure transformers' load and save too, which hold the whole model", True)
    folder: str | None = flag("where to work: needs three times the size (default: the system's temporary folder)")
    output: str | None = flag("write the results to this JSON file")


def convert_benchmark(argv: Sequence[str]) -> Result:
    """``benchmark convert``: import and export by `cp` of the same bytes.

    Raises:
        MegapruneError: a conversion failed, or there is no room.
        UsageError: flags out of range.
    """
    config = _parse(ConvertConfig, argv, "convert", "The cost of a conversion by that of copying its bytes.")
    for name, value, least in (("size_gb", config.size_gb, 0.001), ("repeats", config.repeats, 1)):
        if value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than {least}")
    if config.hidden_size < 512 or config.hidden_size % 512:
        raise UsageError(f"--hidden-size {config.hidden_size} is not a multiple of 512")
    if config.output and Path(config.output).is_dir():
        raise UsageError(f"--output {config.output} is a folder: give the name of a JSON file")
    import tempfile

    from megaprune.benchmarks.convert import measure, measure_fp8
    from megaprune.utils.disk import check_room

    num_bytes = int(config.size_gb * 1e9)
    check_room(Path(config.folder or tempfile.gettempdir()), 3 * num_bytes)
    fp8 = measure_fp8(max(5, config.repeats))
    records = measure(num_bytes, config.hidden_size, config.repeats, config.transformers, config.folder)
    result = {
        "benchmark": "convert",
        "settings": asdict(config),
        "environment": _environment("cpu", 1),
        "cases": records,
        "fp8": fp8,
    }
    print(convert_table(result), flush=True)
    _write(config.output, result)
    return result


def convert_table(result: Result) -> str:
    """The measured conversions, for the terminal."""
    cases = result["cases"]
    rows = [("", "seconds", "GB/s", "ratio", "processor s", "peak MiB")] + [
        (
            record["case"],
            f"{record['seconds']:.2f}",
            f"{record['gigabytes_per_second']:.2f}",
            f"{record['ratio']:.2f}",
            f"{record['processor_seconds']:.2f}",
            f"{record['peak_bytes'] / 2**20:,.0f}",
        )
        for record in cases
    ]
    fp8 = [("one FP8 matrix", "ms", "bit-equal")] + [
        (record["case"], f"{record['milliseconds']:.1f}", "yes" if record["bit_equal"] else "NO")
        for record in result["fp8"]
    ]
    head = (
        f"{cases[0]['bytes'] / 1e9:.2f} GB, largest tensor {cases[0]['largest_tensor_bytes'] / 2**20:,.0f} MiB; "
        f"medians of {result['settings']['repeats']} rounds; ratios are to cp"
    )
    return "\n".join([head, *aligned(rows), "", *aligned(fp8)])


def teacher_cache_benchmark(argv: Sequence[str]) -> Result:
    """``benchmark teacher-cache``: caching by a forward pass alone, reading, and what 16 bits lose.

    Raises:
        MegapruneError: the model or the data can't be used.
        UsageError: flags out of range.
    """
    from megaprune.benchmarks.teacher_cache_case import TeacherCacheConfig, check, measure, teacher_cache_table

    config = _parse(TeacherCacheConfig, argv, "teacher-cache", "What caching a teacher costs, and what it loses.")
    check(config)
    from megaprune import device

    result = {
        "benchmark": "teacher-cache",
        "settings": asdict(config),
        "environment": _environment(device.NAME, 1),
        **measure(config),
    }
    print(teacher_cache_table(result, aligned), flush=True)
    _write(config.output, result)
    return result


def inference_benchmark(argv: Sequence[str]) -> Result:
    """``benchmark inference``: a pruned model beside its original.

    Raises:
        MegapruneError: a model can't be loaded.
        UsageError: flags out of range, or an engine that is not installed.
    """
    from megaprune.benchmarks.inference_case import InferenceConfig, check, inference_table, measure_inference

    config = _parse(InferenceConfig, argv, "inference", "The speed of a pruned model by that of its original.")
    check(config)
    from megaprune import device

    result = {
        "benchmark": "inference",
        "settings": asdict(config),
        "environment": _environment(device.NAME, 1),
        "cases": measure_inference(config),
    }
    print(inference_table(result, aligned), flush=True)
    _write(config.output, result)
    return result


# Each measures, prints a table, writes --output and returns what it wrote.
BENCHMARKS: Mapping[str, Callable[[Sequence[str]], Result]] = {
    "train-step": train_step_benchmark,
    "convert": convert_benchmark,
    "inference": inference_benchmark,
    "teacher-cache": teacher_cache_benchmark,
}


def run(argv: Sequence[str], command: str = "") -> None:
    """Runs the benchmark that the first word names. Collective.

    Raises:
        UsageError: there is no such benchmark, or its flags are wrong.
    """
    known = ", ".join(BENCHMARKS)
    if argv and argv[0] in ("-h", "--help"):
        print(f"usage: benchmark.py <benchmark> [flags]\n\nbenchmarks: {known}\n\nbenchmark.py <benchmark> --help")
        sys.exit(0)
    if not argv:
        raise UsageError(f"name a benchmark: {known}")
    if argv[0] not in BENCHMARKS:
        raise UsageError(f"unknown benchmark {argv[0]!r}; known: {known}")
    BENCHMARKS[argv[0]](argv[1:])


def train_step_table(result: Result) -> str:
    """The measured steps, for the terminal."""
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
    environment = result["environment"]
    where = f"{environment['device']}, {environment['processes']} processes x {environment['threads']} threads"
    head = (
        f"medians of {result['settings']['repeats']} rounds on {where}; ratios are to plain, those beside a teacher to "
        "the same step with cross-entropy"
    )
    return "\n".join([head, *lines])


def _parse(config: type, argv: Sequence[str], name: str, description: str) -> Any:
    return parse_flags(argv, [config], f"benchmark.py {name}", description, recipes=False)[0]


def _check_train_step(config: TrainStepConfig) -> None:
    least = dict.fromkeys(
        ("hidden_size", "num_attention_heads", "vocab_size", "seq_length", "micro_batch_size", "repeats"), 1
    )
    # with fewer layers than 4, half of them can't be masked beside the first and the last
    least |= {"num_layers": 4, "warmup": 0, "tensor_model_parallel_size": 1}
    least |= {name: 1 for name in ("ffn_hidden_size", "num_query_groups") if getattr(config, name) is not None}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(config, name)} is less than {value}")
    heads, groups = config.num_attention_heads, config.num_query_groups
    if config.hidden_size % (2 * heads):
        raise UsageError(f"--hidden-size {config.hidden_size} is not a multiple of 2 x --num-attention-heads {heads}")
    if groups is not None and heads % groups:
        raise UsageError(f"--num-query-groups {groups} does not divide --num-attention-heads {heads}")
    if config.output and Path(config.output).is_dir():
        raise UsageError(f"--output {config.output} is a folder: give the name of a JSON file")


def _environment(device_name: str, processes: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if device_name == "cuda" else device_name
    return {
        "device": device,
        "processes": processes,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def _write(output: str | None, result: Result) -> None:
    if output:
        write_json(output, result)
        print(f"\nwritten to {output}", flush=True)
