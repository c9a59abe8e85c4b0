"""The benchmark `convert`: import and export beside `cp` of the same bytes and transformers' load and save."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megaprune.benchmarks.options import ConvertOptions
from megaprune.benchmarks.timing import Result, environment
from megaprune.models import HFConfig, family_of
from megaprune.models.names import hf_layer
from megaprune.models.shapes import hf_shapes
from megaprune.utils.disk import check_room
from megaprune.utils.errors import MegapruneError
from megaprune.utils.text import aligned
from megaprune.weights.fp8 import BLOCK, dequantize, scale_shape
from megaprune.weights.reader import INDEX
from megaprune.weights.torch_dist.engine import cut
from megaprune.weights.writer import write_safetensors

_SHARD_BYTES = 5 * 10**9
_TOOL = "from megaprune.cli.main import main; main('convert')"
_TRANSFORMERS = (
    "import sys, transformers; "
    "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto'); "
    "model.save_pretrained(sys.argv[2])"
)
_LAUNCH = (
    "import os, sys, time; start = time.perf_counter(); "
    "child = os.spawnvp(os.P_NOWAIT, sys.argv[1], sys.argv[1:]); _, status, usage = os.wait4(child, 0); "
    "print([time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss]); "
    "sys.exit(os.waitstatus_to_exitcode(status))"
)
# a matrix of DeepSeek-R1's experts
FP8_SHAPE = (2048, 7168)


@dataclass(frozen=True)
class Sample:
    """One run of one command."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


def measure(options: ConvertOptions) -> Result:
    """Time import, export and copying of the same bytes.

    Raises:
        MegapruneError: a conversion failed, or there is no room.
    """
    num_bytes = int(options.size_gb * 1e9)
    check_room(Path(options.folder or tempfile.gettempdir()), 3 * num_bytes)
    fp8 = measure_fp8(max(5, options.repeats))
    records = measure_conversions(num_bytes, options.hidden_size, options.repeats, options.transformers, options.folder)
    return {
        "benchmark": "convert",
        "settings": asdict(options),
        "environment": environment("cpu", 1),
        "cases": records,
        "fp8": fp8,
    }


def table(result: Result) -> str:
    """Return the measured conversions as a table for the terminal."""
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


def write_synthetic(folder: Path, num_bytes: int, hidden_size: int) -> int:
    """Write a bf16 checkpoint in LLaMA's shape of about this size; return the bytes of its largest tensor."""
    config: HFConfig = dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=hidden_size // 128,
        num_key_value_heads=max(1, hidden_size // 512),
        head_dim=128,
        vocab_size=32000,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        torch_dtype="bfloat16",
    )
    one_layer = sum(_bytes(shape) for name, shape in _shapes(config).items() if hf_layer(name) is not None)
    outside = sum(_bytes(shape) for name, shape in _shapes(config).items() if hf_layer(name) is None)
    config["num_hidden_layers"] = max(1, round((num_bytes - outside) / one_layer))
    shapes = _shapes(config)
    files = cut(((name, _bytes(shape)) for name, shape in shapes.items()), _SHARD_BYTES)
    noise = torch.randn(max(_bytes(shape) for shape in shapes.values()) // 2).to(torch.bfloat16)
    weight_map: dict[str, str] = {}
    for number, (names, _) in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        described = {name: (shapes[name], "BF16") for name in names}
        tensors = (noise[: torch.Size(shapes[name]).numel()].view(shapes[name]) for name in names)
        write_safetensors(folder / file, described, tensors)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return max(map(_bytes, shapes.values()))


def measure_conversions(
    num_bytes: int, hidden_size: int, repeats: int, with_transformers: bool, folder: str | None
) -> list[dict[str, Any]]:
    """Run every command once a round, each in its own process; return a record per case.

    Before each command, its input is read once, dirty pages are written out, and a file of the model's size is written
    and removed: the page cache holds the input, and the memory for the output was in use a moment ago. (On a virtual
    machine whose host reclaims free memory, the first touch of a page costs ten times the copying.)

    Raises:
        MegapruneError: a command failed.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="megaprune-benchmark-") as scratch:
        root = Path(scratch)
        source, megatron, out = root / "source", root / "megatron", root / "out"
        source.mkdir()
        largest = write_synthetic(source, num_bytes, hidden_size)
        python = [sys.executable, "-c"]
        cases: dict[str, tuple[Path, Path, list[str]]] = {
            "cp": (source, out, ["cp", "-r", str(source), str(out)]),
            "import": (
                source,
                megatron,
                [*python, _TOOL, "import", "--hf-model", str(source), "--megatron-path", str(megatron)],
            ),
            "export": (
                megatron,
                out,
                [*python, _TOOL, "export", "--megatron-path", str(megatron), "--hf-path", str(out)],
            ),
        }
        if with_transformers:
            cases["transformers"] = (source, out, [*python, _TRANSFORMERS, str(source), str(out)])
        samples: dict[str, list[Sample]] = {name: [] for name in cases}
        for _ in range(repeats):
            shutil.rmtree(megatron, ignore_errors=True)
            for name, (given, made, command) in cases.items():
                shutil.rmtree(made, ignore_errors=True)
                _read(given)
                os.sync()
                _fill_and_free(root / "filler", sum(path.stat().st_size for path in source.iterdir()))
                samples[name].append(_run(command))
                if made == out:
                    shutil.rmtree(out)
        total = sum(path.stat().st_size for path in source.iterdir())
    return [_record(name, found, samples["cp"], total, largest) for name, found in samples.items()]


def measure_fp8(repeats: int) -> list[dict[str, Any]]:
    """Time the dequantization of one matrix on one thread, by our code and by two plain versions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(FP8_SHAPE, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(FP8_SHAPE), generator=generator)
    versions: dict[str, Callable[[], torch.Tensor]] = {
        "megaprune": lambda: dequantize(weight, scale),
        "loop over blocks": lambda: _by_loop(weight, scale),
        "view as blocks": lambda: _by_view(weight, scale),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {name: version() for name, version in versions.items()}
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(repeats):
        for name, version in versions.items():
            start = time.perf_counter()
            version()
            seconds[name].append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return [
        {
            "case": name,
            "milliseconds": 1000 * statistics.median(found),
            "bit_equal": torch.equal(results[name], results["loop over blocks"]),
        }
        for name, found in seconds.items()
    ]


def _record(
    name: str, samples: Sequence[Sample], baseline: Sequence[Sample], total: int, largest: int
) -> dict[str, Any]:
    seconds = statistics.median(sample.seconds for sample in samples)
    return {
        "case": name,
        "seconds": seconds,
        "processor_seconds": statistics.median(sample.processor_seconds for sample in samples),
        "gigabytes_per_second": total / seconds / 1e9,
        "ratio": statistics.median(a.seconds / b.seconds for a, b in zip(samples, baseline, strict=True)),
        "peak_bytes": max(sample.peak_bytes for sample in samples),
        "bytes": total,
        "largest_tensor_bytes": largest,
        "samples": [sample.seconds for sample in samples],
    }


def _run(command: Sequence[str]) -> Sample:
    # Through a small process: what a process used most includes the one that it was forked from.
    launched = subprocess.run([sys.executable, "-S", "-c", _LAUNCH, *command], capture_output=True, text=True)
    if launched.returncode:
        raise MegapruneError(f"{command[0]} failed: {launched.stderr[-500:]}")
    seconds, processor_seconds, peak = json.loads(launched.stdout.splitlines()[-1])
    return Sample(seconds, processor_seconds, peak * (1 if sys.platform == "darwin" else 1024))


def _read(folder: Path) -> None:
    block = bytearray(2**24)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(block):
                    pass


def _fill_and_free(path: Path, num_bytes: int) -> None:
    block = bytes(2**24)
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-num_bytes // len(block))):
            file.write(block)
    path.unlink()


def _by_loop(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.bfloat16)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            out[block] = (weight[block].float() * scale[i, j]).to(torch.bfloat16)
    return out


def _by_view(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    blocks = weight.view(scale.shape[0], BLOCK, scale.shape[1], BLOCK)
    return (blocks.float() * scale[:, None, :, None]).to(torch.bfloat16).view(weight.shape)


def _shapes(config: HFConfig) -> dict[str, tuple[int, ...]]:
    family = family_of(config)
    names = [name for rule in family.rules(config) for name in rule.hf]
    return hf_shapes(names, family.architecture(config))


def _bytes(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel() * 2
