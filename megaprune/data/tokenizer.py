"""Tokenizers of HF folders."""

from pathlib import Path
from typing import Any

from megaprune.utils.errors import MegapruneError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of an HF folder.

    Raises:
        MegapruneError: the folder holds none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds; all mean the same here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise MegapruneError(f"{folder} holds no tokenizer that can be loaded: {reason}") from None
