"""The verb `convert`: import, export, verify."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megaprune.errors import MegapruneError, UsageError
from megaprune.flags import Parser, flag

_DIFFERENCES_SHOWN = 10


@dataclass
class ImportConfig:
    """HF safetensors to a Megatron-Core torch_dist checkpoint."""

    hf_model: str | None = flag("HF model: a folder with safetensors, or a hub id")
    megatron_path: str | None = flag("the checkpoint folder to write")
    dtype: Literal["bf16", "fp16", "fp32"] | None = flag("dtype of the weights (default: as stored; bf16 for FP8)")
    workers: int | None = flag("threads of each process (default: 2, under torchrun 1)")
    resume: bool = flag("go on with interrupted work", False)


@dataclass
class ExportConfig:
    """A Megatron-Core torch_dist checkpoint to HF safetensors."""

    megatron_path: str | None = flag("a checkpoint folder that `convert.py import` wrote")
    hf_path: str | None = flag("the HF folder to write")
    max_shard_size: str = flag("largest safetensors file", "5GB")
    workers: int | None = flag("threads of each process (default: 2, under torchrun 1)")
    resume: bool = flag("go on with interrupted work", False)


@dataclass
class VerifyConfig:
    """Compares two HF folders tensor by tensor."""

    hf_model: str | None = flag("an HF folder")
    hf_path: str | None = flag("the other")


def run(argv: Sequence[str]) -> None:
    """Converts or compares.

    Raises:
        MegapruneError: what was asked can't be done, or the folders differ.
        UsageError: the flags are wrong.
    """
    verbs = {"import": (ImportConfig, _import), "export": (ExportConfig, _export), "verify": (VerifyConfig, _verify)}
    if not argv or argv[0] not in verbs:
        if argv and argv[0] in ("-h", "--help"):
            print("usage: convert.py {import,export,verify} [flags]\n")
            for verb, (config, _) in verbs.items():
                print(f"  {verb:<8} {config.__doc__}")
            print("\nconvert.py <verb> --help shows its flags.")
            return
        given = f", not {argv[0]!r}" if argv else ""
        raise UsageError(f"give one of {', '.join(verbs)}{given}")
    settings, work = verbs[argv[0]]
    parser = Parser([settings], prog=f"convert.py {argv[0]}", description=settings.__doc__)
    config = parser.parse_args_into_dataclasses(list(argv[1:]), look_for_args_file=False)[0]
    for name, value in vars(config).items():
        shown = "--" + name.replace("_", "-")
        if value is None and name not in ("dtype", "workers"):
            raise UsageError(f"{shown} is required")
        if name == "workers" and value is not None and value < 1:
            raise UsageError(f"{shown} {value} is less than 1")
    work(config)


def _import(config: ImportConfig) -> None:
    import torch

    from megaprune.conversion.importing import import_checkpoint
    from megaprune.conversion.parts import Labour
    from megaprune.weights.hub import resolve_hf_model
    from megaprune.weights.source import HFSource

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[config.dtype]
    source, folder = HFSource(resolve_hf_model(config.hf_model)), Path(config.megatron_path)
    import_checkpoint(source, folder, dtype, Labour(config.workers, config.resume))
    _say(f"imported {len(source.names):,} tensors of {source.folder} into {folder}")


def _export(config: ExportConfig) -> None:
    from megaprune.conversion.checkpoint_source import CheckpointSource
    from megaprune.conversion.exporting import export_checkpoint
    from megaprune.conversion.parts import Labour
    from megaprune.weights.writer import parse_size

    size = parse_size(config.max_shard_size)
    source, folder = CheckpointSource(config.megatron_path), Path(config.hf_path)
    export_checkpoint(source, folder, size, Labour(config.workers, config.resume))
    _say(f"exported {len(source.names):,} tensors of {config.megatron_path} into {folder}")


def _verify(config: VerifyConfig) -> None:
    from megaprune.conversion.verifying import verify
    from megaprune.weights.source import HFSource

    equal, differences = verify(*(HFSource(folder) for folder in (config.hf_model, config.hf_path)))
    for line in differences[:_DIFFERENCES_SHOWN]:
        print(line)
    if differences:
        raise MegapruneError(f"{equal:,} tensors are equal, {len(differences):,} are not")
    print(f"{equal:,} tensors, all equal")


def _say(text: str) -> Any:
    from megaprune.conversion.parts import is_first

    if is_first():
        print(text, flush=True)
