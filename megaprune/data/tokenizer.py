"""Loading a tokenizer, and saying why one can't be loaded."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from megaprune.utils.errors import MegapruneError
from megaprune.utils.text import first_line
from megaprune.weights.hub import resolve_hf_model

_INSTALL = {"tiktoken": "pip install megaprune[tiktoken]"}
# Files that hold a vocabulary, beside tokenizer.json.
_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab.json", "vocab.txt")
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?")
_MISSING_PACKAGES = re.compile(r"not found in your environment: ([\w-]+)")


def tokenizer_in(name: str | Path, trust_remote_code: bool, flag: str = "") -> Any:
    """The tokenizer of an HF folder, or of a hub id where a flag is named.

    Raises:
        MegapruneError: there is none, or it can't be loaded; says why.
    """
    from transformers import AutoTokenizer

    folder = resolve_hf_model(str(name), flag=flag, tokenizer_only=True) if flag else Path(name)
    where = f"{flag} {name}" if flag else str(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Some classes begin with an empty vocabulary where they find no file.
        is_empty = tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys()
    except Exception as error:  # transformers and the code of a model raise many kinds
        raise MegapruneError(_why(folder, where, error)) from None
    if is_empty:
        raise MegapruneError(f"{where} holds no tokenizer that can be loaded: {_files(folder)}")
    return tokenizer


def model_vocabulary(name: str | Path) -> int | None:
    """The vocabulary of the model beside a tokenizer, as its config.json gives it; None where that says nothing."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        size = config.get("vocab_size")
    except (OSError, ValueError, AttributeError):
        return None
    return size if isinstance(size, int) and size > 0 else None


def _why(folder: Path, where: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return f"the tokenizer in {where} brings code of its own: read it, then pass --trust-remote-code"
    package = _missing_package(folder, error)
    if package:
        return (
            f"the tokenizer in {where} needs the package {package}: {_INSTALL.get(package, f'pip install {package}')}"
        )
    return f"{where} holds no tokenizer that can be loaded: {_reason(folder, error)}"


def _missing_package(folder: Path, error: Exception) -> str | None:
    """The package that is not installed, if that is what the error comes from."""
    met: BaseException | None = error
    while met is not None:
        named = _MISSING_PACKAGES.search(str(met))
        if named:
            return named[1]
        # transformers tries tiktoken on each vocabulary that it could not read otherwise
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
                return f"{path.name} is damaged ({first_line(problem)}); fetch it again"
    said = first_line(error)
    said = said if isinstance(error, (OSError, ValueError, RuntimeError)) else f"{type(error).__name__}: {said}"
    if (folder / "tokenizer.json").is_file():
        return f"tokenizer.json is there, but transformers refuses it ({said})"
    models = [path for path in sorted(folder.glob("*.model")) if not _is_tiktoken(path)]
    for path in models:
        import sentencepiece

        try:
            sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception:  # its own words name a line of C++
            return f"{path.name} is damaged: sentencepiece can't read it; fetch it again"
    return f"transformers says '{said}'" if _vocabularies(folder) else _files(folder)


def _files(folder: Path) -> str:
    found = _vocabularies(folder)
    if not found:
        return "there is neither a tokenizer.json nor another vocabulary, as a tokenizer.model"
    return (
        f"transformers reads no vocabulary from {', '.join(found)}; give a tokenizer.json (`save_pretrained` of a "
        "loaded tokenizer writes one)"
    )


def _vocabularies(folder: Path) -> list[str]:
    return sorted({path.name for pattern in ("tokenizer.json", *_VOCABULARIES) for path in folder.glob(pattern)})
