"""Chats from every kind of file: content in parts, template arguments, and ignored fields."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megaprune.cli import main as cli
from megaprune.data import preprocess
from megaprune.data.chat import argument_columns, as_written, checked_messages, template_names
from megaprune.utils.errors import MegapruneError
from tests.data.test_prepare import PLAIN, jsonl, make_tokenizer, prepare, write

# Writes all that it is given, as templates with tools do.
FULL = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for d in documents or [] %}<doc>{{ d.text }}"
    "{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<no-think>{% endif %}"
    "{% for m in messages %}"
    "<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>{% if m.reasoning_content %}({{ m.reasoning_content }})"
    "{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function | tojson }}]{% endfor %}{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "string"}}}}}
CALLS = [
    {"role": "user", "content": "rain?"},
    {
        "role": "assistant",
        "reasoning_content": "ask",
        "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Rome"}}}],
    },
    {"role": "tool", "name": "weather", "content": "no"},
    {"role": "assistant", "content": "no rain"},
]
TIME = [
    {"role": "user", "content": "when?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {"zone": "CET"}}}]},
]
PLAIN_CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
ROWS = [
    {"messages": CALLS, "tools": [WEATHER, CLOCK]},
    {"messages": TIME, "tools": [CLOCK], "documents": [{"title": "t", "text": "a clock"}]},
    {"messages": PLAIN_CHAT, "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": PLAIN_CHAT},
]


def expected(tokenizer, rows):
    """Return the tokens that transformers produces."""
    ids = []
    for row in rows:
        row = dict(row)
        arguments = row.pop("chat_template_kwargs", {})
        tools, documents = row.get("tools"), row.get("documents")
        ids += tokenizer.apply_chat_template(row["messages"], tools=tools, documents=documents, **arguments)[
            "input_ids"
        ]
    return ids


def tokens(path, tokenizer, tmp_path, **options):
    return prepare(path, tokenizer, tmp_path, seq_length=4, **options).stream.tokens.tolist()


def as_parquet(path, rows):
    pyarrow.parquet.write_table(as_table(rows), path)
    return str(path)


def as_table(rows):
    """Return an Arrow table whose structs keep the order of the keys, which older versions of Arrow would sort."""
    return pyarrow.Table.from_pylist(rows, pyarrow.schema(list(arrow_type(rows))))


def arrow_type(values):
    values = [value for value in values if value is not None]
    if values and all(isinstance(value, dict) for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        return pyarrow.struct([(name, arrow_type([value.get(name) for value in values])) for name in names])
    if values and all(isinstance(value, list) for value in values):
        return pyarrow.list_(arrow_type([each for value in values for each in value]))
    return pyarrow.infer_type(values)


def as_strings(rows):
    """Return columns as JSON strings, as datasets store them if the rows have different fields."""
    return [{k: json.dumps(v) if k != "messages" else v for k, v in row.items()} for row in rows]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(FULL)


@pytest.mark.parametrize("form", [lambda rows: rows, as_strings], ids=["objects", "strings"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_template_gets_the_fields_of_the_row(tokenizer, tmp_path, kind, form):
    rows = [
        {name: row.get(name) for name in ("messages", "tools", "documents", "chat_template_kwargs")} for row in ROWS
    ]
    rows = [
        {k: v for k, v in row.items() if v is not None}
        for row in form([{k: v for k, v in r.items() if v is not None} for r in rows])
    ]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, jsonl(rows))
    else:
        columns = {k for row in rows for k in row}
        as_parquet(path, [{k: row.get(k) for k in columns} for row in rows])
    assert tokens(str(path), tokenizer, tmp_path) == expected(tokenizer, ROWS)


def test_structs_of_parquet_do_not_write_null(tokenizer, tmp_path):
    # both tools in one column: Arrow gives each the other's parameter, as null
    path = as_parquet(
        tmp_path / "a.parquet", [{"messages": m, "tools": t} for m, t in ((CALLS, [WEATHER]), (TIME, [CLOCK]))]
    )
    text = tokenizer.decode(tokens(path, tokenizer, tmp_path))
    assert "null" not in text and "zone" in text


def test_rows_of_the_hub(tokenizer, tmp_path, monkeypatch, capsys):
    names = ("messages", "tools", "documents", "chat_template_kwargs", "source")
    as_parquet(tmp_path / "a.parquet", [{name: (row | {"source": "s"}).get(name) for name in names} for row in ROWS])
    rows = pyarrow.parquet.read_table(tmp_path / "a.parquet").to_pylist()
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)
    assert tokens("org/chats", tokenizer, tmp_path) == expected(tokenizer, ROWS)
    assert capsys.readouterr().out.count("--train-data org/chats, row 1 of split train: the column 'source'") == 1


def test_templates_get_no_null_fields_of_messages():
    # whatever the version of transformers does about them
    row = as_table([{"messages": CALLS}]).to_pylist()[0]
    assert row["messages"][1]["content"] is None and row["messages"][0]["name"] is None
    assert checked_messages(as_written(row, "messages")["messages"], "row 1", "messages") == CALLS
    given = {"role": "assistant", "content": None, "tool_calls": CALLS[1]["tool_calls"]}
    assert "content" not in checked_messages([given], "line 1", "messages")[0]


def test_null_in_json_is_kept(tokenizer, tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": PLAIN_CHAT, "tools": [tool]}]))
    assert '"default": null' in tokenizer.decode(tokens(path, tokenizer, tmp_path))


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_no_tools_are_none(tokenizer, tmp_path, none):
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": PLAIN_CHAT, "tools": none}]))
    assert tokens(path, tokenizer, tmp_path) == expected(tokenizer, [{"messages": PLAIN_CHAT}])


def test_a_column_that_the_template_has_a_variable_for(tokenizer, tmp_path):
    assert argument_columns(tokenizer) == ("tools", "documents", "chat_template_kwargs", "enable_thinking")
    row = {"messages": PLAIN_CHAT, "enable_thinking": False}
    for path in (write(tmp_path / "a.jsonl", jsonl([row])), as_parquet(tmp_path / "a.parquet", [row])):
        assert tokens(path, tokenizer, tmp_path) == expected(tokenizer, ROWS[2:3])


def test_the_template_for_tools(tmp_path):
    tokenizer = make_tokenizer({"default": PLAIN, "tool_use": FULL})
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[1:2] + ROWS[3:]))
    assert tokens(path, tokenizer, tmp_path) == expected(tokenizer, ROWS[1:2] + ROWS[3:])


def test_text_parts_are_joined(tokenizer, tmp_path):
    parts = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it?"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": ["a ", "cat"]}]
    whole = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cat"}]
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": chat}]))
    assert tokens(path, tokenizer, tmp_path) == expected(tokenizer, [{"messages": whole}])
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}]
    image = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]
    path = as_parquet(tmp_path / "a.parquet", [{"messages": chat}, {"messages": image}])
    with pytest.raises(MegapruneError, match=r"row 2: message 1 of 'messages' has a part of type 'image': only text"):
        tokens(path, tokenizer, tmp_path)
    path = as_parquet(tmp_path / "b.parquet", [{"messages": chat}])
    assert tokens(path, tokenizer, tmp_path) == expected(tokenizer, [{"messages": whole}])


def test_results_of_tools_may_be_json(tokenizer, tmp_path):
    rows = [{"messages": [*PLAIN_CHAT, {"role": "tool", "content": content}]} for content in ({"a": 1}, [{"b": 2}])]
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    assert tokens(path, tokenizer, tmp_path) == expected(tokenizer, rows)


def said(content):
    return {"messages": [{"role": "user", "content": content}]}


REFUSED = {
    "image": (
        said([{"type": "text", "text": "a"}, {"type": "image"}]),
        "message 1 of 'messages' has a part of type 'image'",
    ),
    "image url": (said([{"type": "image_url", "image_url": {"url": "u"}}]), "a part of type 'image_url'"),
    "image untyped": (said([{"text": "a", "image": "x.png"}]), "a part of type 'image'"),
    "audio": (said([{"type": "input_audio"}]), "a part of type 'input_audio'"),
    "no text": (said([{"type": "text"}]), "has a text part without text"),
    "object": (said({"a": 1}), "has a dict as its content, not text or a list of text parts"),
    "number": (said(3), "has a int as its content"),
    "numbers": (said([1, 2]), "has a list as its content, not text or a list of text parts"),
    "tools no json": ({"messages": PLAIN_CHAT, "tools": "weather"}, "'tools' is a string that is not valid JSON"),
    "tools an object": ({"messages": PLAIN_CHAT, "tools": WEATHER}, "'tools' is neither a list of objects"),
    "tools names": ({"messages": PLAIN_CHAT, "tools": ["3"]}, "'tools' is neither a list of objects"),
    "documents strings": ({"messages": PLAIN_CHAT, "documents": '["3"]'}, "'documents' is neither a list of objects"),
    "kwargs a list": ({"messages": PLAIN_CHAT, "chat_template_kwargs": [1]}, "'chat_template_kwargs' holds a list"),
    "kwargs ours": (
        {"messages": PLAIN_CHAT, "chat_template_kwargs": {"max_length": 3}},
        "'chat_template_kwargs' holds 'max_length', which is not an argument of a template",
    ),
    "twice": (
        {"messages": PLAIN_CHAT, "tools": [CLOCK], "chat_template_kwargs": {"tools": [WEATHER]}},
        "gives 'tools' twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tokenizer, tmp_path, case):
    row, problem = REFUSED[case]
    path = write(tmp_path / "a.jsonl", jsonl([{"messages": PLAIN_CHAT}, row]))
    with pytest.raises(MegapruneError) as met:
        tokens(path, tokenizer, tmp_path)
    assert problem in str(met.value) and f"--train-data {path}, line 2" in str(met.value)
    assert not (tmp_path / "cache").exists()


def test_keys_that_the_template_ignores_are_named_once(tmp_path, capsys):
    tokenizer = make_tokenizer(PLAIN)
    rows = [{"messages": PLAIN_CHAT}, *[row | {"system": "be brief"} for row in ROWS[:3]] * 3]
    path = write(
        tmp_path / "a.jsonl",
        jsonl([{**row, "messages": [{"content": "", **m} for m in row["messages"]]} for row in rows]),
    )
    tokens(path, tokenizer, tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    about = ["argument 'documents'", "argument 'enable_thinking'", "argument 'tools'", "column 'system'"]
    about += [f"field of messages '{name}'" for name in ("name", "reasoning_content", "tool_calls")]
    assert sorted(word for word in about for note in notes if word in note) == sorted(about)
    assert len(notes) == len(about) and all(f"--train-data {path}, line " in note for note in notes)


def test_keys_that_the_template_reads_are_not_named(tokenizer, tmp_path, capsys):
    tokens(write(tmp_path / "a.jsonl", jsonl(ROWS * 2)), tokenizer, tmp_path)
    assert "note: " not in capsys.readouterr().out


def test_a_template_that_dumps_messages_reads_all(tmp_path, capsys):
    tokenizer = make_tokenizer("{% for m in messages %}{{ m | tojson }}{% endfor %}")
    chats = [[{"role": "user", "content": "a", "mood": "calm"}]]
    tokens(write(tmp_path / "a.jsonl", jsonl([{"messages": chat} for chat in chats])), tokenizer, tmp_path)
    assert "note: " not in capsys.readouterr().out


def test_names_in_a_template():
    variables, names = template_names(
        "{%- if tools is defined %}{% generation %}{{ m.tool_calls }}{{ m['name'] }}{% endgeneration %}{% endif %}"
        "{% for m in messages %}{% if 'x' in m %}{% break %}{% endif %}{% endfor %}"
    )
    assert {"tools", "messages"} <= variables and {"tool_calls", "name", "x", "tools"} <= names
    own = "{% if a %}{% set date = 'today' %}{% endif %}{{ date }}"
    assert template_names(own)[0] == {"a"}
    assert template_names("{% if %}") == (frozenset(), frozenset())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_preprocess_data(tokenizer, tmp_path, capsys, monkeypatch, kind, workers):
    import numpy as np

    monkeypatch.setattr(preprocess, "BATCH_ROWS", 1)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [row | {"id": number} for number, row in enumerate(ROWS)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(path, jsonl(rows))
    else:
        names = ("messages", "tools", "documents", "chat_template_kwargs", "id")
        as_parquet(path, [{name: row.get(name) for name in names} for row in rows])
    words = ["--input", path, "--tokenizer", tmp_path / "tokenizer", "--output-prefix", tmp_path / "p"]
    assert cli.attempt("preprocess-data", [str(w) for w in [*words, "--workers", workers]]) == (0, None)
    found = np.fromfile(tmp_path / "p.bin", np.uint16).tolist()
    wanted = [token for row in ROWS for token in [*expected(tokenizer, [row]), tokenizer.eos_token_id]]
    assert found == wanted
    assert capsys.readouterr().out.count("the column 'id' is not read") == 1
