"""Files beside the weights that are copied to a model made from an HF folder, by an explicit list.

All other files are omitted. Quantization settings, indexes, adapters, optimizer and trainer states, model cards and
results describe the source's weights and would be wrong for others. An ``adapter_config.json`` would even make
transformers load another model.
"""

import ast
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_NAMES = {
    # tokenizers
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "encoder.json",
    "tekken.json",
    # generation and chats
    "generation_config.json",
    "chat_template.json",
}
# Vocabularies of tokenizers, and chat templates.
_SUFFIXES = (".model", ".tiktoken", ".spm", ".bpe", ".vocab", ".jinja")
_LICENSES = re.compile(
    r"(.*[ _-])?(licen[cs]e|notice|copying|use_policy)([ ._-][^.]*)?(\.(txt|md|pdf))?", re.IGNORECASE
)
_TEMPLATES = "additional_chat_templates"
# Code with the names that transformers uses; it may import other modules.
_CODE = re.compile(r"(configuration|modeling|tokenization)_\w+\.py")
_CONFIGS = ("config.json", "tokenizer_config.json")


def files_beside(folder: Path) -> list[Path]:
    """Return the files to copy in order, including the folder of chat templates."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_listed(path.name)]
    templates = folder / _TEMPLATES
    if templates.is_dir():
        found += sorted(path for path in templates.iterdir() if path.suffix == ".jinja")
    return sorted({*found, *_code(folder)})


def _is_listed(name: str) -> bool:
    return name in _NAMES or name.endswith(_SUFFIXES) or bool(_LICENSES.fullmatch(name))


def _code(folder: Path) -> set[Path]:
    """Return the modules that configs name or that have transformers' names, and the modules that these import."""
    left = [path for path in folder.glob("*.py") if _CODE.fullmatch(path.name)]
    left += [folder / f"{module}.py" for name in _CONFIGS for module in _auto_modules(folder / name)]
    found: set[Path] = set()
    while left:
        path = left.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        left += [folder / f"{module}.py" for module in _imported(path)]
    return found


def _auto_modules(config: Path) -> Iterator[str]:
    """Return the modules of this folder in an ``auto_map``; a class with a repository's name is in another folder."""
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    auto_map = settings.get("auto_map") if isinstance(settings, dict) else None
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for reference in _strings(values):
        if "--" not in reference and reference.rpartition(".")[0].isidentifier():
            yield reference.rpartition(".")[0]


def _strings(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            yield from _strings(value)


def _imported(path: Path) -> Iterator[str]:
    """Return the modules that a file imports, relatively or by their plain names."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # not parsable: copied without its imports; transformers will report the error
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
