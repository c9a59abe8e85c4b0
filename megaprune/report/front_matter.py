"""The YAML front matter of model cards: reading it, writing it, and what a pruned model inherits of its source's."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD_NAME = "README.md"
_BLOCK = re.compile(r"---[ \t]*\r?\n(.*?\n)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
# Fields of the source's card that hold for the pruned model too.
_INHERITED = ("license", "license_name", "license_link", "language")


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """Return a card's metadata and its text; no metadata, and the whole card, if its front matter can't be read."""
    match = _BLOCK.match(card)
    try:
        metadata = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        metadata = None
    return (metadata, card[match.end() :]) if match and isinstance(metadata, dict) else ({}, card)


def join_card(metadata: Mapping[str, Any], text: str) -> str:
    """Return a card of these parts. The fields keep their order."""
    block = yaml.safe_dump(dict(metadata), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)
    return f"---\n{block}---\n{text}"


def read_front_matter(folder: str | Path) -> dict[str, Any]:
    """Return the metadata of the card in a model's folder; nothing if there is no card or none with metadata."""
    card = Path(folder) / CARD_NAME
    return split_card(card.read_text(encoding="utf-8", errors="replace"))[0] if card.is_file() else {}


def inherited(folder: str | Path) -> dict[str, Any]:
    """Return the fields of the source's card, in its folder, that its pruned model inherits: license and language.

    A link to a file of the source's repository is left out, unless it is a license, which is copied beside the model.
    """
    metadata = read_front_matter(folder)
    return {name: metadata[name] for name in _INHERITED if metadata.get(name)}
