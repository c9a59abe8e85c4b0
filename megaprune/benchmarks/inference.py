"""The benchmark `inference`: an exported model beside its original, in transformers or vLLM."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from megaprune import device
from megaprune.benchmarks import vllm_engine
from megaprune.benchmarks.options import InferenceOptions
from megaprune.benchmarks.timing import Result, environment, interleaved, median_interval, median_ratio
from megaprune.utils.errors import MegapruneError
from megaprune.utils.text import aligned

Engine = Literal["transformers", "vllm"]
ORIGINAL, PRUNED = "original", "pruned"
# Continues prompts [batch, length] by a number of tokens, and returns when they are done.
Generate = Callable[[torch.Tensor, int], None]


@dataclass(frozen=True)
class Workload:
    """Prompts of random tokens and of equal length, and the number of tokens (at least 2) that continue each."""

    batch_size: int
    prompt_length: int
    new_tokens: int


@dataclass(frozen=True)
class Sample:
    """Time to the first token (TTFT) and per further token (TPOT) of a batch, in seconds."""

    first_token: float
    further_token: float

    def total(self, new_tokens: int) -> float:
        """Return the seconds from the prompt to the last token."""
        return self.first_token + (new_tokens - 1) * self.further_token


def measure(options: InferenceOptions) -> Result:
    """Time both models for each batch size and prompt length.

    Raises:
        MegapruneError: a model can't be loaded.
        UsageError: the engine is not installed.
    """
    return {
        "benchmark": "inference",
        "settings": asdict(options),
        "environment": environment(device.model_name(), 1),
        "cases": _cases(options),
    }


def table(result: Result) -> str:
    """Return the measured workloads as a table for the terminal."""
    cases = result["cases"]
    rows: list[tuple[str, ...]] = [("", "original s", "pruned s", "speed-up", "interval", "of ideal")]
    for record in cases:
        name = f"{record['batch_size']} x {record['prompt_length']} tokens"
        for kind, label in (
            ("first_token", "first token"),
            ("further_token", "per further token"),
            ("total", f"{record['new_tokens']} tokens"),
        ):
            seconds = record[f"{kind}_seconds"]
            rows.append(
                (
                    f"{name}: {label}",
                    f"{seconds['original']:.4f}",
                    f"{seconds['pruned']:.4f}",
                    f"{record[f'{kind}_speed_up']:.3f}",
                    f"{record[f'{kind}_interval']['low']:.3f}-{record[f'{kind}_interval']['high']:.3f}",
                    f"{record[f'{kind}_of_ideal']:.3f}",
                )
            )
    layers, machine = cases[0]["layers"], result["environment"]
    head = (
        f"{layers['original']} -> {layers['pruned']} layers, ideal speed-up {cases[0]['ideal_speed_up']:.3f}; medians "
        f"of {result['settings']['repeats']} rounds in {result['settings']['engine']} on {machine['device']}, "
        f"{machine['threads']} threads; intervals of the median speed-up at "
        f"{cases[0]['total_interval']['confidence']:.1%} confidence"
    )
    return "\n".join([head, *aligned(rows)])


def _cases(options: InferenceOptions) -> list[dict[str, Any]]:
    workloads = [
        Workload(batch, length, options.new_tokens)
        for batch in options.batch_sizes
        for length in options.prompt_lengths
    ]
    with tempfile.TemporaryDirectory() as folder:
        if options.hf_model and options.pruned_model:
            models = {ORIGINAL: Path(options.hf_model), PRUNED: Path(options.pruned_model)}
        else:
            heads = options.num_attention_heads
            sizes = dict(
                hidden_size=options.hidden_size,
                intermediate_size=3 * options.hidden_size,
                num_attention_heads=heads,
                num_key_value_heads=heads if heads % 2 else heads // 2,
                head_dim=options.hidden_size // heads,
                vocab_size=options.vocab_size,
                max_position_embeddings=max(options.prompt_lengths) + options.new_tokens,
            )
            models = make_models(Path(folder), options.num_layers, options.num_pruned, sizes)
        return measure_models(models, options.engine, options.dtype, workloads, options.repeats, options.warmup)


def measure_models(
    models: dict[str, Path], engine: Engine, dtype: str, workloads: Sequence[Workload], repeats: int, warmup: int
) -> list[dict[str, Any]]:
    """Time both models on every workload, interleaved.

    Args:
        models: folders of `ORIGINAL` and `PRUNED`.

    Returns:
        A record for each workload; speed-ups are the original's seconds by the pruned model's, and the ideal is the
        original's number of layers by the pruned model's.

    Raises:
        MegapruneError: a model can't be loaded.
    """
    layers = {name: _num_layers(folder) for name, folder in models.items()}
    generates = {name: _load(folder, engine, dtype, workloads) for name, folder in models.items()}
    vocab_size = min(_config(folder).vocab_size for folder in models.values())
    records = []
    for workload in workloads:
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch_size, workload.prompt_length)
        prompts = torch.randint(vocab_size, shape, generator=generator)
        steps = {name: _timed(generate, prompts, workload.new_tokens) for name, generate in generates.items()}
        records.append(_record(workload, interleaved(steps, repeats, warmup), layers))
    return records


def _timed(generate: Generate, prompts: torch.Tensor, new_tokens: int) -> Callable[[], Sample]:
    def sample() -> Sample:
        first, every = _seconds(generate, prompts, 1), _seconds(generate, prompts, new_tokens)
        return Sample(first, (every - first) / (new_tokens - 1))

    return sample


def _seconds(generate: Generate, prompts: torch.Tensor, new_tokens: int) -> float:
    device.synchronize()
    start = perf_counter()
    generate(prompts, new_tokens)
    device.synchronize()
    return perf_counter() - start


def _record(workload: Workload, samples: dict[str, list[Sample]], layers: dict[str, int]) -> dict[str, Any]:
    times = {
        "first_token": {name: [sample.first_token for sample in found] for name, found in samples.items()},
        "further_token": {name: [sample.further_token for sample in found] for name, found in samples.items()},
        "total": {name: [sample.total(workload.new_tokens) for sample in found] for name, found in samples.items()},
    }
    ideal = layers[ORIGINAL] / layers[PRUNED]
    record: dict[str, Any] = asdict(workload) | {"layers": layers, "ideal_speed_up": ideal}
    for kind, by_model in times.items():
        record[f"{kind}_seconds"] = {name: statistics.median(found) for name, found in by_model.items()}
        speed_up = median_ratio(by_model[ORIGINAL], by_model[PRUNED])
        record[f"{kind}_speed_up"], record[f"{kind}_of_ideal"] = speed_up, speed_up / ideal
        ratios = [a / b for a, b in zip(by_model[ORIGINAL], by_model[PRUNED], strict=True)]
        record[f"{kind}_interval"] = asdict(median_interval(ratios))
    return record | {"rounds": {name: [asdict(sample) for sample in found] for name, found in samples.items()}}


def make_models(folder: Path, num_layers: int, num_pruned: int, sizes: dict[str, Any]) -> dict[str, Path]:
    """Write two Qwen3-like models with random weights, one with fewer layers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    made = {}
    for name, layers in ((ORIGINAL, num_layers), (PRUNED, num_layers - num_pruned)):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, tie_word_embeddings=False, **sizes))
        model.save_pretrained(folder / name)
        made[name] = folder / name
    return made


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many kinds; all mean the same here
        raise MegapruneError(
            f"{folder} contains no model that transformers can load: {str(error).splitlines()[0]}"
        ) from None


def _num_layers(folder: Path) -> int:
    return _config(folder).num_hidden_layers


def _load(folder: Path, engine: Engine, dtype: str, workloads: Sequence[Workload]) -> Generate:
    if engine == "vllm":
        lengths = [workload.prompt_length + workload.new_tokens for workload in workloads]
        return vllm_engine.load(folder, dtype, _config(folder), [each.batch_size for each in workloads], lengths)
    return _in_transformers(folder, dtype)


def _in_transformers(folder: Path, dtype: str) -> Generate:
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = model.to(device.torch_device()).eval()
    except Exception as error:  # transformers raises many kinds; all mean the same here
        raise MegapruneError(f"{folder} can't be loaded by transformers: {str(error).splitlines()[0]}") from None

    def generate(prompts: torch.Tensor, new_tokens: int) -> None:
        ids = prompts.to(model.device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return generate
