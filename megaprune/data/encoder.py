"""Encoding of documents: texts by the tokenizer, chats by its chat template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
from tqdm import tqdm

from megaprune.data.chat import TOOLS, IgnoredFields
from megaprune.data.sources import Document
from megaprune.data.tokenizer import beyond_vocabulary
from megaprune.utils.errors import MegapruneError
from megaprune.utils.progress import bars_are_shown
from megaprune.utils.text import first_line

BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4_000_000
_BAR_DELAY = 3.0  # seconds; shorter work shows no bar
# The block that transformers requires in a template to return a mask of the assistant's tokens.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

EncodedDocument = tuple[np.ndarray, np.ndarray | None]  # tokens [n], loss mask [n] or None for all ones


class Encoder:
    """Encoder of documents, in batches.

    Args:
        dtype: type of the tokens.
        vocab_size: the model's; if given, all tokens are checked against it.
    """

    def __init__(self, tokenizer: Any, dtype: np.dtype, vocab_size: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.vocab_size = vocab_size
        self._ignored = IgnoredFields(tokenizer)

    def encode(self, documents: Iterable[Document], flag: str) -> Iterator[EncodedDocument]:
        """Yield the tokens and loss masks of all documents in order, with a progress bar.

        Raises:
            MegapruneError: the tokenizer or its chat template refuses a document; names the document.
        """
        with tqdm(
            desc=f"tokenizing {flag}", unit=" tokens", unit_scale=True, delay=_BAR_DELAY, disable=not bars_are_shown()
        ) as bar:
            for batch in _batches(documents):
                for tokens, loss_mask in self.encode_batch(batch):
                    yield tokens, loss_mask
                    bar.update(len(tokens))
                for note in self.take_notes().values():
                    bar.write(note)

    def take_notes(self) -> dict[str, str]:
        """Return the messages about ignored fields since the last call, by the name of the field."""
        notes, self._ignored.notes = self._ignored.notes, {}
        return notes

    def encode_batch(self, batch: list[Document]) -> list[EncodedDocument]:
        """Return the tokens and loss masks of a batch of either texts or chats.

        Raises:
            MegapruneError: the tokenizer or its chat template refuses a document, or a token is outside the vocabulary;
                names the document.
        """
        encode = self._encode_chats if batch[0].is_chat else self._encode_texts
        try:
            encoded = encode(batch)
        except MegapruneError:
            raise
        except Exception as error:  # templates and custom tokenizers raise any type
            if len(batch) == 1:
                what = "chat template" if batch[0].is_chat else "tokenizer"
                raise MegapruneError(f"{batch[0].where}: the {what} rejects it ({first_line(error)})") from error
        else:
            for document, (tokens, _) in zip(batch, encoded, strict=True):
                if self.vocab_size is not None and len(tokens) and tokens.max() >= self.vocab_size:
                    raise MegapruneError(
                        beyond_vocabulary(document.where, self.tokenizer, tokens.max(), self.vocab_size)
                    )
                if isinstance(messages := document.content, list):
                    self._ignored.look(document.where, messages, document.arguments, document.unread)
            return encoded
        # Encode one document at a time to find the one that was refused.
        return [encoded for document in batch for encoded in self.encode_batch([document])]

    def _encode_texts(self, batch: list[Document]) -> list[EncodedDocument]:
        eos = self.tokenizer.eos_token_id
        encoded = self.tokenizer(
            [document.content for document in batch],
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning for documents longer than the model's context: they are cut into windows
        )
        return [
            (np.asarray(ids if ids and ids[-1] == eos else [*ids, eos], dtype=self.dtype), None)
            for ids in encoded["input_ids"]
        ]

    def _encode_chats(self, batch: list[Document]) -> list[EncodedDocument]:
        if not self.tokenizer.chat_template:
            raise MegapruneError(
                f"{batch[0].where} is chat, but the tokenizer has no chat template: use a model whose tokenizer has "
                "one, or give the conversations as text"
            )
        # All chats of one call have the same arguments.
        groups = groupby(batch, lambda document: document.arguments)
        return [encoded for arguments, group in groups for encoded in self._encode_alike(list(group), arguments)]

    def _encode_alike(self, batch: list[Document], arguments: dict[str, Any]) -> list[EncodedDocument]:
        template = self.tokenizer.get_chat_template(None, arguments.get(TOOLS))
        marks_assistant = bool(_GENERATION_BLOCK.search(template))
        encoded = self.tokenizer.apply_chat_template(
            [document.content for document in batch],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=marks_assistant,
            tokenizer_kwargs={
                "return_attention_mask": False,
                "return_token_type_ids": False,
                "verbose": False,
            },
            **arguments,
        )
        tokens = [np.asarray(ids, dtype=self.dtype) for ids in encoded["input_ids"]]
        if not marks_assistant:
            return [(ids, None) for ids in tokens]
        return [(i, np.asarray(m, np.uint8)) for i, m in zip(tokens, encoded["assistant_masks"], strict=True)]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield batches of consecutive texts or chats, large enough for a fast tokenizer's threads."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        full = len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS
        if batch and (full or document.is_chat != batch[0].is_chat):
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += sum(len(str(m)) for m in document.content) if document.is_chat else len(document.content)
    if batch:
        yield batch
