"""Tokenizers: the one loader, the reason if one can't be loaded, and what identifies a tokenizer."""

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from megaprune.utils.errors import MegapruneError
from megaprune.utils.text import first_line
from megaprune.weights.hub import resolve_hf_model

_INSTALL = {"tiktoken": "pip install megaprune[tiktoken]"}
# Files that contain a vocabulary, apart from tokenizer.json.
_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?")
_MISSING_PACKAGES = re.compile(r"not found in your environment: ([\w-]+)")


def tokenizer_in(name: str | Path, trust_remote_code: bool, flag: str = "") -> Any:
    """Load the tokenizer of an HF folder, or also of a hub id if `flag` is given.

    Raises:
        MegapruneError: there is no tokenizer, or it can't be loaded; gives the reason.
    """
    from transformers import AutoTokenizer

    folder = resolve_hf_model(str(name), flag=flag, tokenizer_only=True) if flag else Path(name)
    where = f"{flag} {name}" if flag else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Some classes start with an empty vocabulary if they find no file.
        is_empty = tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys()
    except Exception as error:  # transformers and remote code raise many kinds
        raise MegapruneError(_why(folder, where, error)) from None
    if is_empty:
        raise MegapruneError(f"{where} holds no tokenizer that can be loaded: {_files(folder)}")
    return tokenizer


def model_vocabulary(name: str | Path) -> int | None:
    """Return `vocab_size` of the config.json beside a tokenizer; None if it is missing or not a positive integer."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) and size > 0 else None


def vocabulary_size(tokenizer: Any) -> int:
    """Return the largest token id plus one. Ids may have gaps, so this may exceed the number of tokens."""
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def token_dtype(tokenizer: Any) -> np.dtype:
    """Return the type in which the token cache stores the tokenizer's ids: little-endian uint16 or uint32."""
    return np.dtype("<u2" if vocabulary_size(tokenizer) < 65536 else "<u4")


def end_of_text(tokenizer: Any, vocab_size: int | None, flag: str) -> int:
    """Return the id of the token that separates documents. Windows are padded with it too.

    Raises:
        MegapruneError: the tokenizer has no such token, or its id is outside the model's vocabulary.
    """
    token = tokenizer.eos_token_id
    if token is None:
        name = tokenizer.name_or_path or "the model"
        raise MegapruneError(
            f"the tokenizer of {name} has no end-of-text token to separate the documents of {flag}: set eos_token in "
            "its "
            "tokenizer_config.json"
        )
    if vocab_size is not None and token >= vocab_size:
        raise MegapruneError(beyond_vocabulary("the tokenizer's end-of-text token", tokenizer, token, vocab_size))
    return token


def beyond_vocabulary(where: str, tokenizer: Any, token: int, vocab_size: int) -> str:
    """Return the error message for a token outside the model's vocabulary; `where` names its place."""
    name = tokenizer.convert_ids_to_tokens(int(token))
    return (
        f"{where}: the token {name!r} has id {token}, and the model's vocabulary has {vocab_size} (vocab_size in its "
        "config.json): give the model's own tokenizer, leave that token out of the data, or give the model an "
        "embedding for it (transformers' resize_token_embeddings)"
    )


def tokenizer_identity(tokenizer: Any) -> list[Any]:
    """Return plain data that determines the tokens of a text, equal in every process.

    Returns:
        A digest of the vocabulary and the algorithm, the chat template, and the end-of-text id.
    """
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        # Every call sets these anew: if they stayed in, the key would change with the first use.
        state.pop("truncation", None), state.pop("padding", None)
    else:
        state = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return [digest, tokenizer.chat_template, tokenizer.eos_token_id]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hex digest of everything that determines the tokens of a text.

    The chat template is not part of it: its effect shows in the fingerprint of the data.
    """
    digest, _, eos_token_id = tokenizer_identity(tokenizer)
    return hashlib.sha256(f"{digest} {eos_token_id}".encode()).hexdigest()


def _why(folder: Path, where: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"the tokenizer in {where} contains code: review it, then pass --trust-remote-code"
    package = _missing_package(folder, error)
    if package:
        return (
            f"the tokenizer in {where} needs the package {package}: {_INSTALL.get(package, f'pip install {package}')}"
        )
    return f"{where} holds no tokenizer that can be loaded: {_reason(folder, error)}"


def _missing_package(folder: Path, error: Exception) -> str | None:
    """Return the missing package that caused the error, if one did."""
    met: BaseException | None = error
    while met is not None:
        named = _MISSING_PACKAGES.search(str(met))
        if named:
            return named[1]
        # transformers tries tiktoken for every vocabulary that it can't read otherwise.
        if isinstance(met, ModuleNotFoundError) and met.name not in (None, "tiktoken"):
            return met.name.partition(".")[0]
        met = met.__cause__
    if (folder / "tokenizer.json").is_file():
        return None
    for path in sorted(folder.glob("*.model")) + sorted(folder.glob("*.tiktoken")):
        package = "tiktoken" if _is_tiktoken(path) else "sentencepiece"
        if importlib.util.find_spec(package) is None:
            return package
    return None


def _is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(_TIKTOKEN_LINE.fullmatch(file.readline(1 << 16).rstrip(b"\n")))


def _reason(folder: Path, error: Exception) -> str:
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab")):
            try:
                json.loads(path.read_text(encoding="utf-8"))
            except ValueError as problem:
                return f"{path.name} is damaged ({first_line(problem)}); download it again"
    said = first_line(error)
    said = said if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {said}"
    if (folder / "tokenizer.json").is_file():
        return f"tokenizer.json exists, but transformers rejects it ({said})"
    models = [path for path in sorted(folder.glob("*.model")) if not _is_tiktoken(path)]
    for path in models:
        import sentencepiece

        try:
            sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception:  # its message only names a line of C++
            return f"{path.name} is damaged: sentencepiece can't read it; download it again"
    return f"transformers says '{said}'" if _vocabularies(folder) else _files(folder)


def _files(folder: Path) -> str:
    found = _vocabularies(folder)
    if not found:
        return "there is neither a tokenizer.json nor another vocabulary file such as tokenizer.model"
    return (
        f"transformers reads no vocabulary from {', '.join(found)}; give a tokenizer.json (`save_pretrained` of a "
        "loaded tokenizer writes one)"
    )


def _vocabularies(folder: Path) -> list[str]:
    return sorted({path.name for pattern in ("tokenizer.json", *_VOCABULARIES) for path in folder.glob(pattern)})
