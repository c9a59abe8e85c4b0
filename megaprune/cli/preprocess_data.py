"""The verb `preprocess-data`: converts text or chats to Megatron's indexed datasets."""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megaprune.cli.parser import parse_flags
from megaprune.config.fields import flag, flag_name
from megaprune.utils.errors import UsageError

if TYPE_CHECKING:
    from megaprune.data.preprocess import PreprocessOptions

_DESCRIPTION = "Convert text or chats to Megatron's indexed dataset: PREFIX.bin and PREFIX.idx."


@dataclass
class PreprocessConfig:
    """Flags of `preprocess-data`."""

    _argument_group_name = "preprocessing"
    input: list[str] = flag(
        "text or chats: .jsonl, .jsonl.zst, .jsonl.gz or .parquet files, folders of these, or hub dataset ids (ID or "
        "ID:SPLIT)",
        [],
    )
    tokenizer: str | None = flag("tokenizer of the model to prune: a folder or a hub id")
    output_prefix: str | None = flag("path of the dataset to write, without .bin and .idx")
    workers: int | None = flag(
        "number of processes that tokenize (default: one per core); it does not change the output", least=1
    )
    text_key: str = flag("key of the text in each row", "text")
    messages_key: str = flag("key of the chat messages in each row", "messages")
    chat_template: str | None = flag("Jinja file that replaces the tokenizer's chat template")
    trust_remote_code: bool = flag("run code that comes with the tokenizer", False)


def run(argv: Sequence[str], command: str = "") -> None:
    """Write the dataset, and print its size and the speed.

    Raises:
        MegapruneError: the dataset can't be written; no file is left behind.
        UsageError: a flag is wrong.
    """
    [config] = parse_flags(argv, (PreprocessConfig,), "preprocess_data.py", _DESCRIPTION)
    options = _options(config)
    # By default, SIGTERM ends the process without removing unfinished files. SystemExit unwinds the stack.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    from megaprune.data.preprocess import preprocess

    written = preprocess(options)
    if written.masked:
        print(
            "note: the chat template marks the assistant's tokens, but an indexed dataset has no loss mask: every "
            "token will carry loss",
            flush=True,
        )
    print(
        f"{config.output_prefix}.bin and .idx: {written.documents:,} documents, {written.tokens:,} tokens as "
        f"{written.dtype} in {written.seconds:,.1f} s ({written.tokens / written.seconds:,.0f} tokens/s)",
        flush=True,
    )


def _options(config: PreprocessConfig) -> "PreprocessOptions":
    """Return the checked options that the flags describe."""
    from megaprune.data.pool import available_cpus
    from megaprune.data.preprocess import PreprocessOptions, check_outputs

    for name in ("input", "tokenizer", "output_prefix"):
        if not getattr(config, name):
            raise UsageError(f"{flag_name(name)} is required")
    assert config.tokenizer and config.output_prefix
    if config.output_prefix.endswith(("/", ".bin", ".idx")):
        raise UsageError(
            f"--output-prefix {config.output_prefix}: give the dataset's path without .bin or .idx, not a folder's"
        )
    if config.chat_template and not Path(config.chat_template).is_file():
        raise UsageError(f"--chat-template {config.chat_template} is not a file")
    options = PreprocessOptions(
        config.input,
        config.tokenizer,
        config.output_prefix,
        config.workers or available_cpus(),
        config.text_key,
        config.messages_key,
        config.chat_template,
        config.trust_remote_code,
    )
    check_outputs(options)
    return options
