"""Chats: checks of messages and template arguments, and analysis of chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes

from megaprune.utils.errors import MegapruneError

# Columns with arguments of the template, as in transformers and TRL. The last one contains further arguments.
TOOLS, DOCUMENTS, MORE = "tools", "documents", "chat_template_kwargs"
ARGUMENTS = (TOOLS, DOCUMENTS, MORE)
# Parameters of `apply_chat_template` itself, and arguments that this package passes.
_RESERVED = frozenset(
    [
        *("conversation", "messages", "chat_template", "continue_final_message", "sanitize_control_tokens", "tokenize"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
        *("return_assistant_tokens_mask", "self"),
    ]
)
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_MEDIA = ("image", "image_url", "images", "audio", "input_audio", "video", "video_url", "file")
# Roles of messages with the result of a tool, which may be any JSON.
_RESULT_ROLES = ("tool", "ipython", "function")
# The fields of a message that templates write as JSON.
_WRITTEN_AS_JSON = ("content", "tool_calls", "function_call")


def checked_messages(messages: Any, where: str, key: str) -> list[dict[str, Any]]:
    """Return the messages with all their fields but null ones. Content that is a list of text parts is joined.

    Args:
        where: file and row, for error messages.
        key: the column of the messages, for error messages.

    Raises:
        MegapruneError: the value is not a chat, or contains parts other than text.
    """

    # Templates silently ignore unknown fields (such as ShareGPT's "from" and "value"): refuse such chats here.
    def fail(problem: str) -> NoReturn:
        raise MegapruneError(f'{where}: {key!r} {problem}; chat is a list of {{"role": ..., "content": ...}}')

    if not isinstance(messages, list):
        fail(f"holds a {type(messages).__name__}")
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            fail(f"holds a {type(message).__name__} as a message")
        content = message.get("content")
        speaks = content is not None or message.get("tool_calls")
        if not isinstance(message.get("role"), str) or not speaks:
            fail(f"has a message without role or content (its keys: {', '.join(map(str, message)) or 'none'})")
        if content is not None and not isinstance(content, str):
            message = {**message, "content": _joined(content, message["role"], f"{where}: message {number} of {key!r}")}
        # Arrow and chat APIs give missing fields as nulls, which templates write as "None". Only newer versions of
        # transformers remove them.
        checked.append({name: value for name, value in message.items() if value is not None})
    return checked


def _joined(content: Any, role: str, where: str) -> Any:
    is_parts = isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, Mapping) and ("type" in part or "text" in part)) for part in content
    )
    if is_parts:
        return "".join(_text_of(part, where) for part in content)
    if role in _RESULT_ROLES and isinstance(content, (list, Mapping)):
        return content  # templates with tools write it as JSON
    raise MegapruneError(
        f"{where} has a {type(content).__name__} as its content, not text or a list of text parts: give a string, or "
        'a list of {"type": "text", "text": ...}'
    )


def _text_of(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type")
    other = [name for name in _MEDIA if part.get(name) is not None]
    if kind not in _TEXT_PARTS or other:
        raise MegapruneError(
            f"{where} has a part of type {(kind if kind not in _TEXT_PARTS else other[0])!r}: only text is supported; "
            "remove such rows"
        )
    if not isinstance(part.get("text"), str):
        raise MegapruneError(f"{where} has a text part without text (its keys: {', '.join(map(str, part))})")
    return part["text"]


def template_arguments(row: Mapping[str, Any], names: Iterable[str], where: str) -> dict[str, Any]:
    """Return the template arguments in a row.

    Args:
        names: the columns with arguments.
        where: file and row, for error messages.

    Raises:
        MegapruneError: an argument does not have the form that templates expect.
    """
    given = {name: row[name] for name in names if row.get(name) is not None}
    more = _parsed(given.pop(MORE, None), MORE, where)
    if more is not None and not isinstance(more, Mapping):
        raise MegapruneError(f"{where}: {MORE!r} holds a {type(more).__name__}, not an object of template arguments")
    for name, value in (more or {}).items():
        if name in _RESERVED:
            raise MegapruneError(f"{where}: {MORE!r} holds {name!r}, which is not an argument of a template: remove it")
        if name in given and given[name] != value:
            raise MegapruneError(f"{where} gives {name!r} twice, as a key of its own and in {MORE!r}: remove one")
        given[name] = value
    for name in (TOOLS, DOCUMENTS):
        if name in given:
            given[name] = _objects(given[name], name, where)
            if not given[name]:  # the same as a row without the column
                del given[name]
    return given


def _objects(value: Any, name: str, where: str) -> list[Any] | None:
    value = _parsed(value, name, where)
    if value is None:
        return None
    value = [_parsed(each, name, where) for each in value] if isinstance(value, list) else value
    if not isinstance(value, list) or not all(isinstance(each, Mapping) for each in value):
        raise MegapruneError(
            f"{where}: {name!r} is neither a list of objects nor the JSON text of one, as templates expect"
        )
    return value


def _parsed(value: Any, name: str, where: str) -> Any:
    """Parse a value that many datasets store as a JSON string, because a column has one type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise MegapruneError(f"{where}: {name!r} is a string that is not valid JSON ({error})") from None


def as_written(row: Mapping[str, Any], messages: str) -> dict[str, Any]:
    """Return a row as it was before Arrow gave all structs of a column the same fields.

    Null fields are removed from everything that templates write as JSON (tools, their calls and results) and from the
    other arguments.

    Args:
        messages: the column of the chat.
    """
    row = {name: value if name == messages else _without_nulls(value) for name, value in row.items()}
    if isinstance(row.get(messages), list):
        row[messages] = [_message_as_written(message) for message in row[messages]]
    return row


def _message_as_written(message: Any) -> Any:
    if not isinstance(message, Mapping):
        return message
    return {name: _without_nulls(value) if name in _WRITTEN_AS_JSON else value for name, value in message.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value


@lru_cache
def template_names(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the variables that a template reads but never sets, and all names in it.

    Names are those of variables and attributes, and quoted strings. Both sets are empty if the template is invalid;
    rendering it reports the error.
    """
    extensions = [_GenerationBlock, jinja2.ext.loopcontrols]
    environment = jinja2.Environment(extensions=extensions)
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError:
        return frozenset(), frozenset()
    variables = jinja2.meta.find_undeclared_variables(tree) - set(environment.globals)
    # A variable that is set in one branch is the template's own: a column of the same name must not appear in another.
    variables -= {node.name for node in tree.find_all(jinja2.nodes.Name) if node.ctx == "store"}
    names = {node.name for node in tree.find_all(jinja2.nodes.Name)}
    names |= {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    names |= {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
    return frozenset(variables), frozenset(names)


class _GenerationBlock(jinja2.ext.Extension):
    """Parser for transformers' `{% generation %}` block."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def argument_columns(tokenizer: Any) -> tuple[str, ...]:
    """Return the columns of a chat row that are arguments of the tokenizer's template.

    These are the fixed ones (`ARGUMENTS`) and those with the name of a variable of the template.
    """
    templates = tokenizer.chat_template or {}
    variables: set[str] = set()
    for template in templates.values() if isinstance(templates, dict) else [templates]:
        variables |= template_names(template)[0]
    own = {"messages", "add_generation_prompt", "raise_exception", "strftime_now", *tokenizer.special_tokens_map}
    return (*ARGUMENTS, *sorted(variables - own - _RESERVED - set(ARGUMENTS)))


class IgnoredFields:
    """Detector of chat fields that do not affect the rendered text. Each field is reported once.

    Attributes:
        notes: messages by the name of the field.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._looked_at: set[tuple[str, str]] = set()
        self.notes: dict[str, str] = {}

    def look(
        self, where: str, messages: list[dict[str, Any]], arguments: dict[str, Any], unread: Iterable[str]
    ) -> None:
        """Check a chat that the template has rendered.

        Args:
            where: its file and row.
            unread: columns of its row that are not used.
        """
        for name in unread:
            if self._first(("column", name)):
                self.notes[f"column {name}"] = (
                    f"note: {where}: the column {name!r} is not read: only the messages and the variables of the chat "
                    f"template are (put other variables into {MORE!r})"
                )
        fields = {("argument", name) for name in arguments}
        fields |= {("field of messages", name) for message in messages for name in message}
        for kind, name in sorted(fields - self._looked_at):
            if self._first((kind, name)) and name not in ("role", "content"):
                self._compare(where, messages, arguments, kind, name)

    def _first(self, field: tuple[str, str]) -> bool:
        new = field not in self._looked_at
        self._looked_at.add(field)
        return new

    def _compare(self, where: str, messages: list, arguments: dict, kind: str, name: str) -> None:
        if name in template_names(self._tokenizer.get_chat_template(None, arguments.get(TOOLS)))[1]:
            return
        if kind == "argument":
            other = messages, {key: value for key, value in arguments.items() if key != name}
        else:
            other = [{key: m[key] for key in m if key != name} for m in messages], arguments
        try:
            if self._render(messages, arguments) != self._render(*other):
                return
        except Exception:  # a template that fails without the field reads it
            return
        self.notes[f"{kind} {name}"] = (
            f"note: {where}: the chat template ignores the {kind} {name!r}: it has no variable of this name, and "
            "renders the same text without it"
        )

    def _render(self, messages: list, arguments: dict) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
