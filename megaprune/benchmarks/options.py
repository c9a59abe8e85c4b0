"""The options of each benchmark, checked before anything heavy is imported."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megaprune.config.fields import flag, flag_name
from megaprune.utils.errors import UsageError


@dataclass
class TrainStepOptions:
    """A dense model with random weights, and how often to step."""

    # with fewer than 4, half of the layers can't be masked beside the first and the last
    num_layers: int = flag("layers of the model, at least 4", 16, least=4)
    hidden_size: int = flag("hidden size", 512, least=1)
    ffn_hidden_size: int | None = flag("columns of the MLP (default: 3 x the hidden size)", least=1)
    num_attention_heads: int = flag("attention heads", 8, least=1)
    num_query_groups: int | None = flag(
        "key-value heads (default: half of the attention heads, if that is whole)", least=1
    )
    vocab_size: int = flag("vocabulary; small, so that the layers decide the time", 2048, least=1)
    seq_length: int = flag("tokens in a window", 256, least=1)
    micro_batch_size: int = flag("windows in a step of one replica", 4, least=1)
    repeats: int = flag("steps of each kind that are measured", 10, least=1)
    warmup: int = flag("steps of each kind before them", 2, least=0)
    tensor_model_parallel_size: int = flag("tensor-parallel ranks", 1, least=1)
    bf16: bool = flag("train in bf16 (default: fp32)", False)
    transformer_impl: Literal["auto", "transformer_engine", "local"] = flag("layer implementation", "auto")
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
    """A synthetic checkpoint, and how often to convert it."""

    size_gb: float = flag("size of the bf16 checkpoint, in LLaMA's shape", 4.0, least=0.001)
    hidden_size: int = flag("hidden size, a multiple of 512", 4096)
    repeats: int = flag("rounds", 3, least=1)
    transformers: bool = flag("measure transformers' load and save too, which hold the whole model", True)
    folder: str | None = flag("where to work: needs three times the size (default: the system's temporary folder)")
    output: str | None = flag("write the results to this JSON file")

    def check(self) -> None:
        """Raise UsageError for options that do not fit."""
        if self.hidden_size < 512 or self.hidden_size % 512:
            raise UsageError(f"--hidden-size {self.hidden_size} is not a multiple of 512")
        _check_output(self.output)


@dataclass
class InferenceOptions:
    """Two models, or the sizes of two with random weights."""

    hf_model: str | None = flag("the original model (default: random weights of the sizes below)")
    pruned_model: str | None = flag("the pruned model: a run's hf/ folder")
    num_layers: int = flag("random weights: layers of the original", 16, least=2)
    num_pruned: int = flag("random weights: layers that the pruned model lacks", 4, least=1)
    hidden_size: int = flag("random weights: hidden size", 1024, least=1)
    num_attention_heads: int = flag("random weights: attention heads", 16, least=1)
    vocab_size: int = flag("random weights: vocabulary; small, so that the layers decide the time", 2048, least=2)
    batch_sizes: list[int] = flag("prompts at once; each is measured", [1, 8], least=1)
    prompt_lengths: list[int] = flag("tokens of a prompt; each is measured", [128], least=1)
    new_tokens: int = flag("tokens that a prompt is continued by", 16, least=2)
    repeats: int = flag("rounds", 5, least=1)
    warmup: int = flag("rounds before them", 1, least=0)
    engine: Literal["transformers", "vllm"] = flag("what runs the models", "transformers")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("of the weights (auto: as stored)", "auto")
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
    """A trained model, some text, and how often to pass over it."""

    hf_model: str | None = flag("HF model: a folder with safetensors, or a hub id")
    data: list[str] = flag("text, as --train-data of prune.py", [])
    seq_length: int | None = flag("tokens in a window (default: 256, or the model's positions if fewer)", least=1)
    micro_batch_size: int = flag("windows in a forward pass", 4, least=1)
    windows: int = flag("windows of a round", 64, least=1)
    repeats: int = flag("rounds that are measured", 5, least=1)
    bf16: bool = flag("run the model in bf16 (default: fp32)", False)
    output: str | None = flag("write the results to this JSON file")

    def check(self) -> None:
        """Raise UsageError for options that are missing."""
        if not (self.hf_model and self.data):
            raise UsageError("--hf-model and --data are required: a trained model, and text that it knows")
        _check_output(self.output)


Options = TrainStepOptions | ConvertOptions | InferenceOptions | TeacherCacheOptions


def _check_heads(hidden_size: int, heads: int) -> None:
    if hidden_size % (2 * heads):
        raise UsageError(f"--hidden-size {hidden_size} is not a multiple of 2 x --num-attention-heads {heads}")


def _check_output(output: str | None) -> None:
    if output and Path(output).is_dir():
        raise UsageError(f"--output {output} is a folder: give the name of a JSON file")
