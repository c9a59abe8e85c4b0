"""The files beside the weights of an HF folder that a model made from it takes along, by an explicit list.

Whatever is not listed stays behind: quantization settings, indexes and adapters, optimizers' and trainers' states,
cards and results are of the source's weights, and untrue of others. An ``adapter_config.json`` would even have
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
# Code by transformers' names; more may be imported from it.
_CODE = re.compile(r"(configuration|modeling|tokenization)_\w+\.py")
_CONFIGS = ("config.json", "tokenizer_config.json")


def files_beside(folder: Path) -> list[Path]:
    """The files to take along, templates' folder included, in order."""
    found = [path for path in sorted(folder.iterdir()) if path.is_file() and _is_listed(path.name)]
    templates = folder / _TEMPLATES
    if templates.is_dir():
        found += sorted(path for path in templates.iterdir() if path.suffix == ".jinja")
    return sorted({*found, *_code(folder)})


def _is_listed(name: str) -> bool:
    return name in _NAMES or name.endswith(_SUFFIXES) or bool(_LICENSES.fullmatch(name))


def _code(folder: Path) -> set[Path]:
    """The modules that configs name or that have transformers' names, and what they import of the folder."""
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
    """The modules of the folder's own in an ``auto_map``: those of classes without a repository's name."""
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
    """The modules that a file imports, relatively or by their plain names."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):  # it stands for itself; transformers will say what it thinks of it
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from [node.module.partition(".")[0]] if node.module else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
