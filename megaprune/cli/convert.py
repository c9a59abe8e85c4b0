"""The verb `convert`: import, export, verify."""

import argparse
from collections.abc import Sequence

from megaprune import api
from megaprune.cli.parser import Parser
from megaprune.utils.errors import MegapruneError
from megaprune.utils.progress import say

_DIFFERENCES_SHOWN = 10


def run(argv: Sequence[str], command: str = "") -> None:
    """Convert a checkpoint, or compare two.

    Raises:
        MegapruneError: the conversion is not possible, or the folders differ.
        UsageError: a flag is wrong.
    """
    arguments = _parser().parse_args(argv)
    arguments.work(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="convert.py", description="Convert HF safetensors to a Megatron-Core checkpoint and back.")
    verbs = parser.add_subparsers(required=True, metavar="{import,export,verify}", parser_class=Parser)

    def add(name: str, help: str, work: object) -> argparse.ArgumentParser:
        verb = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        verb.set_defaults(work=work)
        return verb

    importing = add("import", "HF safetensors to a Megatron-Core torch_dist checkpoint", _import)
    importing.add_argument("--hf-model", required=True, help="HF model: a folder with safetensors files, or a hub id")
    importing.add_argument("--megatron-path", required=True, help="checkpoint folder to write")
    importing.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: as stored; bf16 for FP8)"
    )
    exporting = add("export", "a Megatron-Core torch_dist checkpoint to HF safetensors", _export)
    exporting.add_argument("--megatron-path", required=True, help="checkpoint written by `megaprune convert import`")
    exporting.add_argument("--hf-path", required=True, help="HF folder to write")
    exporting.add_argument("--max-shard-size", default="5GB", help="maximum size of a safetensors file (default: 5GB)")
    for verb in (importing, exporting):
        verb.add_argument("--workers", type=_positive, help="threads per process (default: 2; under torchrun: 1)")
        verb.add_argument("--resume", action="store_true", help="continue interrupted work")
    verifying = add("verify", "compare two HF folders tensor by tensor", _verify)
    verifying.add_argument("--hf-model", required=True, help="first HF folder")
    verifying.add_argument("--hf-path", required=True, help="second HF folder")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _import(given: argparse.Namespace) -> None:
    report = api.import_hf(
        given.hf_model, given.megatron_path, dtype=given.dtype, workers=given.workers, resume=given.resume
    )
    say(f"imported {report.tensors:,} tensors of {report.source} into {report.output}")


def _export(given: argparse.Namespace) -> None:
    report = api.export_hf(
        given.megatron_path,
        given.hf_path,
        max_shard_size=given.max_shard_size,
        workers=given.workers,
        resume=given.resume,
    )
    say(f"exported {report.tensors:,} tensors of {given.megatron_path} into {report.output}")


def _verify(config: argparse.Namespace) -> None:
    from megaprune.weights.source import HFSource
    from megaprune.weights.verify import verify

    equal, differences = verify(*(HFSource(folder) for folder in (config.hf_model, config.hf_path)))
    for line in differences[:_DIFFERENCES_SHOWN]:
        print(line)
    if differences:
        raise MegapruneError(f"{equal:,} tensors are equal, {len(differences):,} are not")
    print(f"{equal:,} tensors, all equal")
