"""``benchmark inference``: its flags and its table."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaprune.cli.parser import flag
from megaprune.utils.errors import UsageError


@dataclass
class InferenceConfig:
    """The flags of `benchmark inference`: two models, or the sizes of two with random weights."""

    hf_model: str | None = flag("the original model (default: random weights of the sizes below)")
    pruned_model: str | None = flag("the pruned model: a run's hf/ folder")
    num_layers: int = flag("random weights: layers of the original", 16)
    num_pruned: int = flag("random weights: layers that the pruned model lacks", 4)
    hidden_size: int = flag("random weights: hidden size", 1024)
    num_attention_heads: int = flag("random weights: attention heads", 16)
    vocab_size: int = flag("random weights: vocabulary; small, so that the layers decide the time", 2048)
    batch_sizes: list[int] = flag("prompts at once; each is measured", [1, 8])
    prompt_lengths: list[int] = flag("tokens of a prompt; each is measured", [128])
    new_tokens: int = flag("tokens that a prompt is continued by", 16)
    repeats: int = flag("rounds", 5)
    warmup: int = flag("rounds before them", 1)
    engine: Literal["transformers", "vllm"] = flag("what runs the models", "transformers")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("of the weights (auto: as stored)", "auto")
    output: str | None = flag("write the results to this JSON file")


def check(config: InferenceConfig) -> None:
    """Raises UsageError: flags that are out of range or don't fit each other."""
    if (config.hf_model is None) != (config.pruned_model is None):
        raise UsageError("--hf-model and --pruned-model go together")
    for name, value in (("hf-model", config.hf_model), ("pruned-model", config.pruned_model)):
        if value is not None and not (Path(value) / "config.json").is_file():
            raise UsageError(f"--{name} {value} holds no config.json: give a model's folder")
    least = {"hidden_size": 1, "num_attention_heads": 1, "vocab_size": 2, "num_layers": 2, "num_pruned": 1}
    least |= {"new_tokens": 2, "repeats": 1, "warmup": 0}
    values = [(name, getattr(config, name), minimum) for name, minimum in least.items()]
    for name in ("batch_sizes", "prompt_lengths"):
        values += [(name, value, 1) for value in getattr(config, name) or [0]]
    for name, value, minimum in values:
        if value < minimum:
            raise UsageError(f"--{name.replace('_', '-')} {value} is less than {minimum}")
    if config.num_pruned >= config.num_layers:
        raise UsageError(f"--num-pruned {config.num_pruned} leaves nothing of --num-layers {config.num_layers}")
    if config.hidden_size % (2 * config.num_attention_heads):
        raise UsageError(
            f"--hidden-size {config.hidden_size} is not a multiple of 2 x --num-attention-heads "
            f"{config.num_attention_heads}"
        )
    if config.output and Path(config.output).is_dir():
        raise UsageError(f"--output {config.output} is a folder: give the name of a JSON file")


def measure_inference(config: InferenceConfig) -> list[dict[str, Any]]:
    """A record for each batch size and prompt length."""
    from megaprune.benchmarks.inference import ORIGINAL, PRUNED, Workload, make_models, measure

    workloads = [
        Workload(batch, length, config.new_tokens) for batch in config.batch_sizes for length in config.prompt_lengths
    ]
    with tempfile.TemporaryDirectory() as folder:
        if config.hf_model is not None:
            models = {ORIGINAL: Path(config.hf_model), PRUNED: Path(config.pruned_model)}
        else:
            heads = config.num_attention_heads
            sizes = dict(
                hidden_size=config.hidden_size,
                intermediate_size=3 * config.hidden_size,
                num_attention_heads=heads,
                num_key_value_heads=heads if heads % 2 else heads // 2,
                head_dim=config.hidden_size // heads,
                vocab_size=config.vocab_size,
                max_position_embeddings=max(config.prompt_lengths) + config.new_tokens,
            )
            models = make_models(Path(folder), config.num_layers, config.num_pruned, sizes)
        return measure(models, config.engine, config.dtype, workloads, config.repeats, config.warmup)


def inference_table(result: dict[str, Any], aligned: Callable[[Sequence[Sequence[str]]], list[str]]) -> str:
    """The measured workloads, for the terminal."""
    cases = result["cases"]
    rows: list[tuple[str, ...]] = [("", "original s", "pruned s", "speed-up", "of ideal")]
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
                    f"{record[f'{kind}_of_ideal']:.3f}",
                )
            )
    layers, environment = cases[0]["layers"], result["environment"]
    head = (
        f"{layers['original']} -> {layers['pruned']} layers, ideal speed-up {cases[0]['ideal_speed_up']:.3f}; medians "
        f"of {result['settings']['repeats']} rounds in {result['settings']['engine']} on {environment['device']}, "
        f"{environment['threads']} threads"
    )
    return "\n".join([head, *aligned(rows)])
