"""Tiny random HF checkpoints with a tokenizer and chat data, for tests of whole runs."""

import itertools
import json
import keyword
import os
import random
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

from megaprune.data.batches import Batch
from megaprune.models.sizes import inventory, layer_sizes
from megaprune.report.performance import MEASURED
from tests.helpers import pangu
from tests.helpers.tiny_families import FAMILIES, MOE_FAMILIES, NESTED, VOCAB_SIZE

SEQ_LENGTH = 32

_ROOT = Path(__file__).parents[2]
# With glibc's defaults, small training steps on a CPU spend half of their time on returning memory.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "1073741824",
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "268435456",
}

_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bot|>{% generation %}{{ m['content'] }}<|eos|>"
    "{% endgeneration %}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
)


def make_model(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", **changed: Any
) -> Path:
    """Save a random model of a family and its tokenizer. In ``bfloat16``, its norms stay in fp32, as in some models.

    Args:
        changed: settings of the model's config in place of the family's own.
    """
    if family == pangu.CONFIG["model_type"]:
        pangu.make_checkpoint(folder, dtype, pangu.CONFIG | changed)
        make_tokenizer().save_pretrained(folder)
        return folder
    model_type, settings = (FAMILIES | MOE_FAMILIES)[family]
    generator = torch.Generator().manual_seed(len(family))
    model = _auto_class(model_type).from_config(AutoConfig.for_model(model_type, **(settings | changed)), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                # from fp32, so that a detour over bf16 shows
                parameter.data = (0 if model_type == "gemma3_text" else 1) + 0.2 * noise
            else:
                scale = 0.3 if "embed" in name or "lm_head" in name or parameter.ndim == 1 else 0.1
                parameter.copy_(scale * noise)
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if family == "kimi_k25":
        _name_as_released(folder)
    if family == "pangu_embedded":
        _rename_family(folder, "PanguEmbedded", {"attention_bias": "bias"})
    make_tokenizer().save_pretrained(folder)
    return folder


def _auto_class(model_type: str) -> type:
    """Return transformers' class of models with a language model's output."""
    return AutoModelForImageTextToText if model_type in NESTED else AutoModelForCausalLM


def _name_as_released(folder: Path) -> None:
    """Undo a change of Kimi's names, which transformers' reversal of its own conversion makes in the wrong place."""
    for path in folder.glob("*.safetensors"):
        tensors = {
            name.replace("language_model.model.blocks.", "language_model.model.layers."): tensor
            for name, tensor in load_file(path).items()
        }
        save_file(tensors, path, metadata={"format": "pt"})
    for path in folder.glob("*.index.json"):
        path.write_text(path.read_text().replace("language_model.model.blocks.", "language_model.model.layers."))


def _rename_family(folder: Path, model_type: str, keys: dict[str, str]) -> None:
    """Change the family in config.json, and the names of keys."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"model_type": model_type}
    path.write_text(json.dumps({keys.get(key, key): value for key, value in config.items()}))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, smaller than the models' vocabulary, whose chat template marks the assistant's
    tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|eos|>", "<|user|>", "<|bot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([_sentence(random.Random(0)) for _ in range(200)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", chat_template=_CHAT_TEMPLATE)


def make_data(path: Path, rows: int, seed: int) -> Path:
    """Write alternating texts and chats, so that windows differ in the number of tokens with loss."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for row in range(rows):
            question, answer = _sentence(rng), _sentence(rng)
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": chat} if row % 2 else {"text": question}) + "\n")
    return path


def make_data_folder(folder: Path, train_rows: int, valid_rows: int) -> Path:
    """Write train.jsonl and valid.jsonl."""
    make_data(folder / "train.jsonl", rows=train_rows, seed=1)
    make_data(folder / "valid.jsonl", rows=valid_rows, seed=2)
    return folder


def _sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(keyword.kwlist, k=rng.randint(4, 12)))


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of an HF folder."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = load_file(path)
        assert not found.keys() & tensors.keys(), f"{path} repeats a tensor"
        tensors |= found
    return tensors


def load_hf(folder: Path) -> torch.nn.Module:
    """Load the folder in transformers, in fp32; fail unless every weight fits.

    openPangu-Embedded, for which transformers has no class, is loaded as the Llama with biases that it equals.
    """
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as copy:
        if config["model_type"] == "PanguEmbedded":
            for path in folder.iterdir():
                (Path(copy) / path.name).symlink_to(path.resolve())
            (Path(copy) / "config.json").unlink()
            (Path(copy) / "config.json").write_text(json.dumps(config))
            _rename_family(Path(copy), "llama", {"bias": "attention_bias"})
            folder = Path(copy)
        model, info = _auto_class(config["model_type"]).from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def hf_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits [b, s, vocab] that transformers, or openPangu's reference, computes for tokens [b, s]."""
    if json.loads((folder / "config.json").read_text())["model_type"] == pangu.CONFIG["model_type"]:
        return pangu.logits(folder, tokens)
    return load_hf(folder)(tokens).logits


def random_tokens(batch: int = 2, seq_length: int = 97) -> torch.Tensor:
    """Return tokens [b, s] beyond the original context of llama3's RoPE scaling."""
    return torch.randint(VOCAB_SIZE, (batch, seq_length), generator=torch.Generator().manual_seed(5))


def make_batch(tokens: torch.Tensor, loss_mask: torch.Tensor | None = None) -> Batch:
    """Return tokens [b, s + 1] as a micro-batch that predicts each token from the previous ones."""
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    loss_mask = torch.ones(labels.shape) if loss_mask is None else loss_mask
    positions = torch.arange(inputs.shape[1]).expand_as(inputs).contiguous()
    return Batch(inputs, labels, loss_mask, positions, list(range(len(tokens))))


def uneven_batches(sizes: Sequence[int]) -> list[Batch]:
    """Return four windows with very different shares of tokens with loss, in micro-batches of these sizes."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(VOCAB_SIZE, (4, 21), generator=generator)
    shares = torch.tensor([0.05, 1.0, 0.3, 0.6])[:, None]
    loss_mask = (torch.rand(4, 20, generator=generator) < shares).float()
    return [make_batch(t, m) for t, m in zip(tokens.split(sizes), loss_mask.split(sizes), strict=True)]


class FixedMask:
    """Selector for models of 7 layers that always returns the same mask and stores the gradient that it receives."""

    def mask(self, step: int) -> torch.Tensor:
        return torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])

    def update(self, mask_grad: torch.Tensor, step: int) -> None:
        self.mask_grad = mask_grad


def prune_argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of a small E3 run, 10 iterations of search and 10 of recovery, uneven on two stages."""
    flags = {
        "--hf-model": model,
        "--train-data": data / "train.jsonl",
        "--valid-data": data / "valid.jsonl",
        "--save": save,
        "--num-layers-to-prune": 2,
        "--train-iters": 20,
        "--search-iters": 10,
        "--calibration-samples": 4,
        "--seq-length": SEQ_LENGTH,
        "--micro-batch-size": 2,
        "--global-batch-size": 4,
        "--lr": 2e-3,
        "--lr-warmup-iters": 3,
        "--weight-decay": 0.1,
        "--max-shard-size": "100KB",
    }
    return [str(word) for pair in flags.items() for word in pair] + list(extra)


def moe_prune_argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of such a run on `deepseek_v3` whose limit is one parameter too small for a dense and a MoE
    layer of the three layers that may go, two of them MoE.
    """
    argv = prune_argv(model, data, save, *extra)
    sizes = layer_sizes(json.loads((model / "config.json").read_text()))
    total = inventory(json.loads((model / "config.json").read_text())).size.total
    at = argv.index("--num-layers-to-prune")
    argv[at : at + 2] = ["--target-params", str(total - sizes[-1].total - 1)]
    return argv


def select_argv(model: Path, data: Path, save: Path, method: str, *extra: str) -> list[str]:
    """Return the flags of a run that selects its layers by calibration data and does not train."""
    argv = prune_argv(model, data, save, "--method", method, *extra)
    for flag in ("--search-iters", "--lr-warmup-iters"):
        at = argv.index(flag)
        del argv[at : at + 2]
    return [*argv, "--train-iters", "0"]


def endpoint_argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of a short run by CLP, which then trains the two layers next to the cut."""
    return [*select_argv(model, data, save, "clp", *extra), "--train-iters", "4", "--search-iters", "9"]


def stitched_argv(model: Path, data: Path, save: Path, gone: str, *extra: str) -> list[str]:
    """Return the flags of a run that folds maps of the named layers into the layers before them and does not train."""
    argv = select_argv(model, data, save, "manual", "--stitch", "fold")
    at = argv.index("--num-layers-to-prune")
    argv[at : at + 2] = ["--prune-layers", gone]
    return [*argv, *extra]


def rounds_argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of a short run in two rounds, each with a stitch."""
    return [
        *select_argv(model, data, save, "shortgpt", "--num-layers-to-prune", "3", "--rounds", "2", "--stitch", "fold"),
        *("--train-iters", "4", "--lr-warmup-iters", "1", "--lr", "3e-4", *extra),
    ]


def healed_argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of a run that trains two candidates for 2 iterations each, of 10."""
    healing = ["--heal-candidates", "2", "--heal-iters", "2", "--selection-budget", "30000", "--stitch", "none"]
    return [*select_argv(model, data, save, "auto"), *healing, "--train-iters", "10", "--lr", "3e-3", *extra]


def sheared_argv(model: Path, data: Path, save: Path, *extra: str) -> list[str]:
    """Return the flags of a short search by hard concrete gates."""
    return [*select_argv(model, data, save, "sheared", *extra), "--train-iters", "8", "--search-iters", "6"]


@contextmanager
def without_plots() -> Iterator[None]:
    """Runs draw no plots, which take a fifth of a tiny run's time."""
    with (
        patch("megaprune.pruning.export.write_plots", return_value=[]),
        patch("megaprune.pruning.rounds.write_plots", return_value=[]),
    ):
        yield


def run_here(argv: Sequence[str], should_stop: Callable[[], bool] | None = None) -> None:
    """Run in this process, as the command line does, but without plots. Other runs may follow."""
    from megaprune import api
    from megaprune.cli.console import console
    from megaprune.cli.prune import parse_config
    from megaprune.cli.signals import StopRequest

    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with console(), without_plots():
            api.prune(parse_config(argv), should_stop=should_stop or StopRequest(), command="prune.py")
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)


def stop_after(iterations: int | None) -> Callable[[], bool]:
    """Return a function that asks a run to stop after this number of iterations (None: never)."""
    asked = itertools.count()  # the first call is before any iteration
    return lambda: next(asked) == iterations


def steady(record: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of a step's record that are the same when the run is repeated."""
    return {name: value for name, value in record.items() if name not in MEASURED}


def environment() -> dict[str, str]:
    """Return the environment of a process that runs the project from this source tree."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | _ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
