"""Prompts, and the rows that the model's completions make of them: texts and chats."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from megaprune.data.chat import DOCUMENTS, MORE, TOOLS, argument_columns
from megaprune.data.sources import Document, RowKeys, Source, document_of, read_rows
from megaprune.generation.engines import Completion
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line

_ROLES = ("system", "developer", "user", "assistant")
_PLACE = "\u00a7question\u00a7"  # stands for the user's words where the template is asked for what precedes them
_UNFINISHED = "\ufffd"  # as decoders write bytes that are no character yet

# Continues prompts, each with the seed of its random numbers; the flag says whether they are chats.
Complete = Callable[[Sequence[Sequence[int]], Sequence[int], bool], list[Completion]]


@dataclass(frozen=True)
class TextPrompt:
    """The beginning of a text.

    Args:
        where: its file and row, for error messages.
        head: tokens before the text, which are not part of it.
        tokens: the beginning of the text.
    """

    where: str
    head: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class ChatPrompt:
    """A chat whose answers are missing.

    Args:
        where: its file and row, for error messages.
        turns: the messages before each answer; an empty turn is a question that the model writes.
        arguments: further arguments of the chat template.
    """

    where: str
    turns: list[list[dict[str, Any]]]
    arguments: dict[str, Any] = field(default_factory=dict)


Prompt = TextPrompt | ChatPrompt


@dataclass(frozen=True)
class Written:
    """A row of the output.

    Args:
        tokens: the number that the model wrote.
        cut: whether one of its texts was cut at the limit.
    """

    row: dict[str, Any]
    tokens: int
    cut: bool


class Writer:
    """Maker of prompts from documents, and of rows from prompts and what the model writes.

    Args:
        context: the number of positions of the model, if known.
    """

    def __init__(self, tokenizer: Any, prompt_tokens: int, max_new_tokens: int, context: int | None) -> None:
        self._tokenizer = tokenizer
        self._prompt_tokens, self._max_new_tokens, self._context = prompt_tokens, max_new_tokens, context

    def prompts(self, sources: Sequence[Source], text_key: str, messages_key: str, limit: int | None) -> list[Prompt]:
        """Return the prompts in the data, up to a limit.

        Raises:
            MegapruneError: a row can't be a prompt, or there is none.
        """
        keys = RowKeys(text_key, messages_key, argument_columns(self._tokenizer))
        documents = (document_of(row, keys) for row in read_rows(sources, keys, "--prompts", hub_cache=None))
        found = [self._prompt(document) for document in islice((d for d in documents if d.content), limit)]
        if not found:
            raise MegapruneError("--prompts holds no documents: every row is empty")
        return found

    def own_beginning(self, chat: bool) -> Prompt:
        """Return the prompt with which the model begins by itself.

        Raises:
            UsageError: the tokenizer has no token to begin with, or no chat template.
        """
        if chat:
            prompt: Prompt = ChatPrompt("--chat", [[]])
        else:
            start = self._tokenizer.bos_token_id
            start = self._tokenizer.eos_token_id if start is None else start
            if start is None:
                raise UsageError("--prompts is required: the tokenizer has no token that begins a text")
            prompt = TextPrompt("--prompt-tokens", [start], [])
        self._check_length(prompt)
        return prompt

    def first_tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens of which the engine first continues a prompt."""
        if isinstance(prompt, TextPrompt):
            return prompt.head + prompt.tokens
        return self._rendered(prompt, prompt.turns[0]) if prompt.turns[0] else self._before_question(prompt)

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[str], complete: Complete) -> list[Written]:
        """Return the row of each prompt.

        Args:
            seeds: a different text for each prompt, which determines its random numbers.
        """
        written: list[Written | None] = [None] * len(prompts)
        texts = [place for place, prompt in enumerate(prompts) if isinstance(prompt, TextPrompt)]
        if texts:
            given = [self.first_tokens(prompts[place]) for place in texts]
            found = complete(given, [_seed(seeds[place], 0) for place in texts], False)
            for place, completion in zip(texts, found, strict=True):
                written[place] = self._text(prompts[place], completion)
        chats = {place: _Chat(prompt) for place, prompt in enumerate(prompts) if isinstance(prompt, ChatPrompt)}
        while asking := {place: tokens for place, chat in chats.items() if (tokens := self._next(chat)) is not None}:
            step = {place: _seed(seeds[place], chats[place].steps) for place in asking}
            found = complete(list(asking.values()), list(step.values()), True)
            for place, completion in zip(asking, found, strict=True):
                chats[place].add(self._decoded(completion.tokens, completion), completion)
        for place, chat in chats.items():
            written[place] = chat.written()
        return [row for row in written if row is not None]

    def _prompt(self, document: Document) -> Prompt:
        if isinstance(document.content, str):
            prompt: Prompt = self._text_prompt(document.where, document.content)
        else:
            turns = _turns(document.content, document.where)
            prompt = ChatPrompt(document.where, turns, document.arguments)
        self._check_length(prompt)
        return prompt

    def _text_prompt(self, where: str, text: str) -> TextPrompt:
        tokens = self._tokenizer(text, add_special_tokens=False).input_ids[: self._prompt_tokens]
        begin = self._tokenizer("").input_ids[:1]
        return TextPrompt(where, begin if begin == [self._tokenizer.bos_token_id] else [], tokens)

    def _check_length(self, prompt: Prompt) -> None:
        length = len(self.first_tokens(prompt))
        if self._context is not None and length + self._max_new_tokens > self._context:
            raise UsageError(
                f"{prompt.where}: a prompt of {length} tokens and --max-new-tokens {self._max_new_tokens} are beyond "
                f"the {self._context} positions of the model: lower them"
                + ("" if isinstance(prompt, TextPrompt) else ", or leave this row out")
            )

    def _next(self, chat: "_Chat") -> list[int] | None:
        """Return the tokens that the model is to continue next; None if the chat is complete.

        A chat also ends where its next turn would exceed the model's positions.
        """
        if chat.left and not chat.left[0] and not chat.messages:
            return self._before_question(chat.prompt)
        if not chat.left:
            return None
        tokens = self._rendered(chat.prompt, [*chat.messages, *chat.left[0]])
        fits = self._context is None or len(tokens) + self._max_new_tokens <= self._context
        return tokens if fits else None

    def _rendered(self, prompt: ChatPrompt, messages: Sequence[dict[str, Any]]) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **prompt.arguments
            )
        except Exception as error:  # templates raise whatever they like
            raise MegapruneError(f"{prompt.where}: the chat template rejects it ({first_line(error)})") from error
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _before_question(self, prompt: ChatPrompt) -> list[int]:
        try:
            asked = [{"role": "user", "content": _PLACE}]
            text = self._tokenizer.apply_chat_template(asked, tokenize=False, **prompt.arguments)
        except Exception as error:  # as above; without a template too
            raise UsageError(f"--chat: the tokenizer can't render a chat ({first_line(error)})") from error
        before, found, _ = text.partition(_PLACE)
        if not found or not before:
            raise UsageError(
                "--chat: the chat template writes nothing before the user's words, so the model can't be asked to "
                "write them"
            )
        return self._tokenizer(before, add_special_tokens=False).input_ids

    def _text(self, prompt: Any, completion: Completion) -> Written:
        text = self._decoded(prompt.tokens + completion.tokens, completion)
        return Written({"text": text}, len(completion.tokens), not completion.ended)

    def _decoded(self, tokens: Sequence[int], completion: Completion) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text if completion.ended else text.rstrip(_UNFINISHED)


class _Chat:
    """A chat that the model is completing."""

    def __init__(self, prompt: ChatPrompt) -> None:
        self.prompt, self.left = prompt, list(prompt.turns)
        self.messages: list[dict[str, Any]] = []
        self.steps = self._tokens = 0
        self._cut = False

    def add(self, text: str, completion: Completion) -> None:
        """Add the message that the model has written: the question if the turn has none, else the answer."""
        if self.left[0]:
            self.messages += [*self.left.pop(0), {"role": "assistant", "content": text}]
        else:
            self.left[0] = [{"role": "user", "content": text.strip()}]
        self.steps += 1
        self._tokens += len(completion.tokens)
        self._cut |= not completion.ended

    def written(self) -> Written:
        """Return the chat as a row, with the arguments of its template where `RowKeys` looks for them."""
        row: dict[str, Any] = {"messages": self.messages}
        given = self.prompt.arguments
        row |= {name: given[name] for name in (TOOLS, DOCUMENTS) if name in given}
        if more := {name: value for name, value in given.items() if name not in (TOOLS, DOCUMENTS)}:
            row[MORE] = more
        return Written(row, self._tokens, self._cut)


def _turns(messages: Sequence[dict[str, Any]], where: str) -> list[list[dict[str, Any]]]:
    """Return the messages before each answer of a chat, without the answers.

    Raises:
        MegapruneError: the chat has a message that only makes sense after its own answers, or no user message.
    """
    turns: list[list[dict[str, Any]]] = [[]]
    for message in messages:
        role = message["role"]
        if role not in _ROLES or message.get("tool_calls"):
            what = f"of role {role!r}" if role not in _ROLES else "that calls tools"
            raise MegapruneError(
                f"{where}: a chat with a message {what} is not a prompt, because the model's own answers replace "
                "those in it: remove such rows"
            )
        if role == "assistant":
            turns.append([])
        else:
            turns[-1].append(message)
    # An answer that opens the chat, or follows another one, belongs to no question and is left out.
    asked: list[list[dict[str, Any]]] = []
    before: list[dict[str, Any]] = []
    for turn in turns:
        before += turn
        if turn and turn[-1]["role"] == "user":
            asked.append(before)
            before = []
    if not asked or before:
        raise MegapruneError(
            f"{where}: a chat must end with a message of the user, or with the answer to one, to be a prompt"
        )
    return asked


def _seed(text: str, step: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{text} {step}".encode(), digest_size=7).digest(), "big")
