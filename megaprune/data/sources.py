"""Sources of documents: files, folders and hub datasets. Errors name the flag, the file and the line."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megaprune.data.chat import ARGUMENTS, as_written, checked_messages, template_arguments
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line
from megaprune.weights.hub import check_link

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.zst", ".jsonl.gz", ".json.zst", ".json.gz")
SUFFIXES = (*JSON_SUFFIXES, ".parquet")
# Endings of data files. A name with such an ending is a mistyped or unsupported path, never a dataset id.
# (Ids may contain dots, such as "org/corpus-v1.5", so not every dot is a file ending.)
_FILE_ENDING = re.compile(
    r"\.(jsonl?|parquet|txt|csv|tsv|md|arrow|bin|idx|npy|npz|pt|pkl|zip|tar|tgz|zst|gz|bz2|xz)$",
    re.IGNORECASE,
)
# Sources below this total size are identified by their content, so that a copy elsewhere uses the same cache.
# Hashing larger ones would delay every start of every rank; they are identified by size and modification time.
HASHED_BYTES = 1 << 30
_PARQUET_BATCH_ROWS = 128


@dataclass(frozen=True)
class FileSource:
    """One data file. `name` is its path relative to the folder that the user gave."""

    path: Path
    name: str


@dataclass(frozen=True)
class HubSource:
    """One split of a dataset on the Hugging Face Hub."""

    dataset_id: str
    split: str


Source = FileSource | HubSource


@dataclass(frozen=True)
class Document:
    """A text, or a chat as a list of messages.

    Args:
        where: its file and row, for error messages.
        arguments: arguments of the chat template in addition to the messages.
        unread: other columns of a chat's row, which are not used.
    """

    where: str
    content: str | list[dict[str, Any]]
    arguments: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def is_chat(self) -> bool:
        """True for a chat, False for a text."""
        return not isinstance(self.content, str)


@dataclass(frozen=True)
class Row:
    """A row as it was read.

    Args:
        where: its file and row, for error messages.
        content: the bytes of a JSON line that is not parsed yet, or the parsed row of other formats.
        bytes_read: bytes of all files read so far, as stored; hub datasets do not count.
        columns: all columns of the file, if not all of them were read.
    """

    where: str
    content: Any
    bytes_read: int
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RowKeys:
    """The keys of a row's text, of its chat, and of the arguments of the chat template.

    A row with both a text and a chat counts as a text.
    """

    text: str = "text"
    messages: str = "messages"
    arguments: tuple[str, ...] = ARGUMENTS


def find_sources(paths: Sequence[str], flag: str) -> list[Source]:
    """Return the files and hub datasets that `paths` name, in the given order; files of a folder sorted by path.

    Fetches nothing and opens no file.

    Raises:
        UsageError: there is no path, a path does not exist or has an unsupported ending, a file is empty, or a folder
            contains no data file.
    """
    if not paths:
        raise UsageError(f"{flag} names no data: give a file, a folder or a dataset id")
    return [source for path in paths for source in _expand(path, flag)]


def _expand(given: str, flag: str) -> list[Source]:
    path = Path(given)
    if _looks_like_path(given):
        check_link(path, f"{flag} {given}")
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if _is_data_file(found.relative_to(path), found))
        if not files:
            raise UsageError(f"{flag} {given}: no {_listed(SUFFIXES)} file in this folder")
    elif path.exists():
        if not path.name.endswith(SUFFIXES):
            raise UsageError(f"{flag} {given}: unsupported file ending; give {_listed(SUFFIXES)}")
        files = [path]
    elif _looks_like_path(given):
        raise UsageError(f"{flag} {given} does not exist and is not a dataset id; check the path")
    else:
        dataset_id, _, split = given.partition(":")
        return [HubSource(dataset_id, split or "train")]
    for file in files:
        check_link(file, f"{flag} {file}")
        if file.stat().st_size == 0:
            raise UsageError(f"{flag} {file} is empty (0 bytes): remove it or write it again")
    return [FileSource(file, str(file.relative_to(path)) if path.is_dir() else file.name) for file in files]


def _is_data_file(relative: Path, path: Path) -> bool:
    hidden = any(part.startswith(".") for part in relative.parts)
    # A broken link is missing data and must not be skipped.
    return not hidden and relative.name.endswith(SUFFIXES) and (path.is_file() or not path.exists())


def _looks_like_path(given: str) -> bool:
    return given.startswith((".", "/", "~")) or given.count("/") > 1 or bool(_FILE_ENDING.search(given))


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + " or " + words[-1]


def source_identity(sources: Sequence[Source]) -> list[list[str | int]]:
    """Return plain data that identifies the sources, without network access.

    A file is identified by its name, size and content (from 1 GiB in total on, by its modification time instead of its
    content), a hub dataset by its id and split.
    """
    by_content = sum(s.path.stat().st_size for s in sources if isinstance(s, FileSource)) < HASHED_BYTES
    return [_identity(source, by_content) for source in sources]


def _identity(source: Source, by_content: bool) -> list[str | int]:
    if isinstance(source, HubSource):
        return ["hub", source.dataset_id, source.split]
    status = source.path.stat()
    if not by_content:
        return ["modified", source.name, status.st_size, status.st_mtime_ns]
    with source.path.open("rb") as file:
        return ["sha256", source.name, status.st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def read_documents(sources: Sequence[Source], keys: RowKeys, flag: str, hub_cache: Path) -> Iterator[Document]:
    """Yield all documents in order, without empty ones.

    Args:
        hub_cache: folder for the files that the datasets library caches.

    Raises:
        MegapruneError: a row is not a document, or a source can't be read; names the first such row or source.
    """
    documents = (document_of(row, keys) for row in read_rows(sources, keys, flag, hub_cache))
    return (document for document in documents if document.content)


def read_rows(sources: Sequence[Source], keys: RowKeys, flag: str, hub_cache: Path | None) -> Iterator[Row]:
    """Yield all rows in order.

    `document_of` parses them, possibly in another process, because most of the time is spent in parsing JSON.

    Args:
        hub_cache: folder for the files that the datasets library caches; None for the library's own cache.

    Raises:
        MegapruneError: a file or a hub dataset can't be read.
    """
    done = 0
    for source in sources:
        if isinstance(source, HubSource):
            for where, row in _hub_rows(source, keys, flag, hub_cache):
                yield Row(where, row, done)
            continue
        place = f"{flag} {source.path}"
        try:
            if source.path.suffix == ".parquet":
                for row in _parquet_rows(source.path, keys, place):
                    yield replace(row, bytes_read=done + row.bytes_read)
            else:
                for where, content, position in _json_rows(source.path, place):
                    yield Row(where, content, done + position)
            done += source.path.stat().st_size
        except (OSError, pyarrow.ArrowException) as error:
            raise MegapruneError(
                f"{place} cannot be read ({first_line(error)}): create or download it again"
            ) from error


def document_of(row: Row, keys: RowKeys) -> Document:
    """Return the document in a row.

    Raises:
        MegapruneError: the row is not a document; names its file and line.
    """
    content = row.content
    if isinstance(content, bytes):
        content = _json(_utf8(content, row.where), row.where)
    return _document(row.where, content, keys, row.columns)


def _json_rows(path: Path, place: str) -> Iterator[tuple[str, Any, int]]:
    codec = {".zst": "zstd", ".gz": "gzip"}.get(path.suffix)
    # Arrow's stream reads files of several frames and, unlike zstandard's reader, detects a truncated file.
    with pyarrow.OSFile(str(path)) as file, pyarrow.input_stream(file, compression=codec) as stream:
        lines = io.BufferedReader(stream)
        if ".json" in path.suffixes and lines.peek(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
            text = _utf8(lines.read(), place)
            for number, row in enumerate(_json(text, place), start=1):
                yield f"{place}, row {number}", row, file.tell()
            return
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{place}, line {number}", line, file.tell()


def _utf8(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MegapruneError(f"{where} is not UTF-8 ({error.reason}): convert the file to UTF-8") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise MegapruneError(f"{where} is not valid JSON: {error.msg} ({line}column {error.colno})") from error


def _parquet_rows(path: Path, keys: RowKeys, place: str) -> Iterator[Row]:
    number, size = 0, path.stat().st_size
    with pyarrow.parquet.ParquetFile(path) as file:
        # Decode only the needed columns. If neither text nor chat exists, decode all, so that the error names them.
        names = file.schema_arrow.names
        wanted = [name for name in (keys.text, keys.messages) if name in names]
        if keys.messages in wanted:
            wanted += [name for name in keys.arguments if name in names and name not in wanted]
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=wanted or None):
            for row in batch.to_pylist():
                number += 1
                position = size * number // file.metadata.num_rows
                yield Row(f"{place}, row {number}", as_written(row, keys.messages), position, tuple(names))


def _hub_rows(source: HubSource, keys: RowKeys, flag: str, hub_cache: Path | None) -> Iterator[tuple[str, Any]]:
    # Imported here: both take seconds to import, and local data needs neither.
    import datasets
    import huggingface_hub

    place = f"{flag} {source.dataset_id}"
    try:
        # This fails at once if there is no such dataset; load_dataset retries for half a minute.
        huggingface_hub.HfApi().dataset_info(source.dataset_id, timeout=20)
    except Exception as error:  # wrong id, no network, no access: the classes differ between client versions
        raise MegapruneError(
            f"{place} does not exist, and the hub does not provide it as a dataset ({first_line(error)})"
        ) from error
    try:
        kept = {"cache_dir": str(hub_cache)} if hub_cache else {}
        rows = datasets.load_dataset(source.dataset_id, split=source.split, streaming=True, **kept)
        for number, row in enumerate(rows, start=1):
            yield f"{place}, row {number} of split {source.split}", as_written(row, keys.messages)
    except Exception as error:  # as above
        raise MegapruneError(
            f"{place}: split {source.split!r} cannot be read from the hub ({first_line(error)}); "
            "download it and give the files, or name another split as ID:SPLIT"
        ) from error


def _document(where: str, row: Any, keys: RowKeys, columns: Sequence[str]) -> Document:
    if not isinstance(row, Mapping):
        raise MegapruneError(f'{where} is not a JSON object: each row must be one, as {{"{keys.text}": "..."}}')
    if row.get(keys.text) is not None:
        return Document(where, _checked_text(row[keys.text], where, keys))
    if row.get(keys.messages) is not None:
        messages = checked_messages(row[keys.messages], where, keys.messages)
        arguments = template_arguments(row, keys.arguments, where)
        read = {keys.text, keys.messages, *keys.arguments}
        unread = tuple(name for name in columns or row if name not in read)
        return Document(where, messages, arguments, unread)
    if keys.text in row or keys.messages in row:
        held = keys.text if keys.text in row else keys.messages
        raise MegapruneError(f"{where}: {held!r} is null; remove the row, or name another key with --text-key")
    raise MegapruneError(
        f"{where} has neither {keys.text!r} nor {keys.messages!r}; its keys are "
        f"{', '.join(map(str, row)) or 'none'}: name the key of the text with --text-key, or that of the chat with "
        "--messages-key"
    )


def _checked_text(text: Any, where: str, keys: RowKeys) -> str:
    if not isinstance(text, str):
        raise MegapruneError(
            f"{where}: {keys.text!r} holds a {type(text).__name__}, not a string; "
            "name another key with --text-key (for chat, use --messages-key)"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can contain half a surrogate pair, which is not text
        raise MegapruneError(
            f"{where}: {keys.text!r} holds an unpaired surrogate escape (\\ud800 to \\udfff)"
        ) from error
    return text
