"""The options of each benchmark, checked before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaprune.config.fields import flag, flag_name
from megaprune.utils.errors import UsageError


@dataclass
class TrainStepOptions:
    """A dense model with random weights, and the number of steps."""

    # with fewer than 4, half of the layers can't be masked beside the first and the last
    num_layers: int = flag("number of layers, at least 4", 16, least=4)
    hidden_size: int = flag("hidden size", 512, least=1)
    ffn_hidden_size: int | None = flag("intermediate size of the MLP (default: 3 x the hidden size)", least=1)
    num_attention_heads: int = flag("number of attention heads", 8, least=1)
    num_query_groups: int | None = flag(
        "number of key-value heads (default: half of the attention heads if their number is even, else all)",
        least=1,
    )
    vocab_size: int = flag(
        "size of the vocabulary; small by default, so that the layers determine the time", 2048, least=1
    )
    seq_length: int = flag("tokens in a window", 256, least=1)
    micro_batch_size: int = flag("windows per step of a data-parallel replica", 4, least=1)
    repeats: int = flag("number of measured steps of each kind", 10, least=1)
    warmup: int = flag("number of warm-up steps of each kind", 2, least=0)
    tensor_model_parallel_size: int = flag("number of tensor-parallel ranks", 1, least=1)
    bf16: bool = flag("train in bf16 instead of fp32", False)
    transformer_impl: Literal["auto", "transformer_engine", "local"] = flag(
        "layer implementation; auto uses Transformer Engine if it is available", "auto"
    )
    output: str | None = flag("write the results to this JSON file")

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        heads, groups = self.num_attention_heads, self.num_query_groups
        _check_heads(self.hidden_size, heads)
        if groups is not None and heads % groups:
            raise UsageError(f"--num-query-groups {groups} does not divide --num-attention-heads {heads}")
        _check_output(self.output)


@dataclass
class ConvertOptions:
    """A synthetic checkpoint, and the number of conversions."""

    size_gb: float = flag("size in GB of the bf16 checkpoint, which has the shape of a LLaMA model", 4.0, least=0.001)
    hidden_size: int = flag("hidden size, a multiple of 512", 4096)
    repeats: int = flag("number of measured rounds", 3, least=1)
    transformers: bool = flag(
        "also measure loading and saving with transformers, which holds the whole model in memory", True
    )
    folder: str | None = flag(
        "working folder with space for three times the size (default: the system's temporary folder)"
    )
    output: str | None = flag("write the results to this JSON file")

    def check(self) -> None:
        """Raise UsageError for options that do not fit."""
        if self.hidden_size < 512 or self.hidden_size % 512:
            raise UsageError(f"--hidden-size {self.hidden_size} is not a multiple of 512")
        _check_output(self.output)


@dataclass
class InferenceOptions:
    """Two models, or the sizes of two with random weights."""

    hf_model: str | None = flag("original model (default: random weights of the sizes given by the other flags)")
    pruned_model: str | None = flag("pruned model: the hf/ folder of a run")
    num_layers: int = flag("with random weights: number of layers of the original model", 16, least=2)
    num_pruned: int = flag("with random weights: number of removed layers", 4, least=1)
    hidden_size: int = flag("with random weights: hidden size", 1024, least=1)
    num_attention_heads: int = flag("with random weights: number of attention heads", 16, least=1)
    vocab_size: int = flag(
        "with random weights: size of the vocabulary; small by default, so that the layers determine the time",
        2048,
        least=2,
    )
    batch_sizes: list[int] = flag("numbers of prompts in a batch; each one is measured", [1, 8], least=1)
    prompt_lengths: list[int] = flag("numbers of tokens in a prompt; each one is measured", [128], least=1)
    new_tokens: int = flag("number of tokens to generate per prompt", 16, least=2)
    repeats: int = flag("number of measured rounds; 6 are the least for intervals of 95% confidence", 6, least=1)
    warmup: int = flag("number of warm-up rounds", 1, least=0)
    engine: Literal["transformers", "vllm"] = flag("library that runs the models", "transformers")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("dtype of the weights (auto: as stored)", "auto")
    output: str | None = flag("write the results to this JSON file")

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if (self.hf_model is None) != (self.pruned_model is None):
            raise UsageError("--hf-model and --pruned-model go together")
        for name, value in (("hf-model", self.hf_model), ("pruned-model", self.pruned_model)):
            if value is not None and not (Path(value) / "config.json").is_file():
                raise UsageError(f"--{name} {value} holds no config.json: give a model's folder")
        for name in ("batch_sizes", "prompt_lengths"):
            if not getattr(self, name):
                raise UsageError(f"{flag_name(name)} needs a number")
        if self.num_pruned >= self.num_layers:
            raise UsageError(f"--num-pruned {self.num_pruned} leaves nothing of --num-layers {self.num_layers}")
        _check_heads(self.hidden_size, self.num_attention_heads)
        _check_output(self.output)


@dataclass
class TeacherCacheOptions:
    """A trained model, data, and the number of passes."""

    hf_model: str | None = flag("HF model: a folder with safetensors files, or a hub id")
    data: list[str] = flag("data, in the formats of --train-data of `megaprune prune`", [])
    seq_length: int | None = flag("tokens in a window (default: 256, or the model's maximum if it is smaller)", least=1)
    micro_batch_size: int = flag("windows per forward pass", 4, least=1)
    windows: int = flag("windows per round", 64, least=1)
    repeats: int = flag("number of measured rounds", 5, least=1)
    bf16: bool = flag("run the model in bf16 instead of fp32", False)
    output: str | None = flag("write the results to this JSON file")

    def check(self) -> None:
        """Raise UsageError for options that are missing."""
        if not (self.hf_model and self.data):
            raise UsageError("--hf-model and --data are required: a trained model, and text like its training data")
        _check_output(self.output)


Options = TrainStepOptions | ConvertOptions | InferenceOptions | TeacherCacheOptions


def _check_heads(hidden_size: int, heads: int) -> None:
    if hidden_size % (2 * heads):
        raise UsageError(f"--hidden-size {hidden_size} is not a multiple of 2 x --num-attention-heads {heads}")


def _check_output(output: str | None) -> None:
    if output and Path(output).is_dir():
        raise UsageError(f"--output {output} is a folder: give the name of a JSON file")
