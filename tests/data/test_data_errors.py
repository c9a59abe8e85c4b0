"""Unusable data: the error is one line that names the flag, the file and the row, and no output remains."""

import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megaprune.data.prepare import prepare_dataset
from megaprune.utils.errors import MegapruneError, UsageError

GOOD = b'{"text": "a b c d e f g h"}\n'
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def make_tokenizer(eos="<eos>", chat_template=None):
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=chat_template)


def refusal(path, tmp_path, *, tokenizer=None, error=MegapruneError, **options):
    """Return the message with which `path` is refused: one line with the flag. Check that no cache exists."""
    cache_dir = tmp_path / "run" / "cache"
    options = {"seq_length": 4, "cache_dir": cache_dir, "flag": "--valid-data", **options}
    paths = path if isinstance(path, list) else [str(path)]
    with pytest.raises(error) as caught:
        prepare_dataset(paths, tokenizer or make_tokenizer(), **options)
    message = str(caught.value)
    assert "\n" not in message and "--valid-data" in message
    assert not (tmp_path / "run").exists()
    return message


def file_with(tmp_path, body, name="data.jsonl"):
    path = tmp_path / name
    path.write_bytes(body)
    return path


@pytest.mark.parametrize("path", ["./none", "/no/where", "a/b/c", "none.jsonl", "org/none.parquet", "x.txt", "~/x"])
def test_a_missing_path_is_not_requested_from_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **o: pytest.fail("asked the hub"))
    message = refusal(path, tmp_path, error=UsageError)
    assert f"{path} does not exist and is not a dataset id" in message


def test_unknown_dataset_id(tmp_path, monkeypatch):
    def dataset_info(self, dataset_id, **options):
        raise RuntimeError("404 Client Error.\n\nRepository Not Found for url: ...")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    message = refusal("org/none", tmp_path)
    assert (
        "org/none does not exist, and the hub does not provide it as a dataset" in message
        and "404 Client Error" in message
    )


def test_hub_dataset_that_ends_early(tmp_path, monkeypatch):
    def rows(*args, **options):
        yield {"text": "a b c d e f g"}
        raise ConnectionError("connection lost")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **o: None)
    monkeypatch.setattr("datasets.load_dataset", rows)
    message = refusal("org/corpus:test", tmp_path)
    assert "org/corpus: split 'test' cannot be read from the hub (connection lost)" in message


def test_no_paths(tmp_path):
    assert "names no data" in refusal([], tmp_path, error=UsageError)


def test_unsupported_ending(tmp_path):
    path = file_with(tmp_path, b"text", "data.txt")
    message = refusal(path, tmp_path, error=UsageError)
    assert str(path) in message and "unsupported file ending" in message and ".parquet" in message


def test_empty_file_and_folder(tmp_path):
    assert "is empty" in refusal(file_with(tmp_path, b""), tmp_path, error=UsageError)
    (tmp_path / "folder").mkdir()
    file_with(tmp_path / "folder", b"", "notes.txt")
    assert "no .jsonl" in refusal(tmp_path / "folder", tmp_path, error=UsageError)


@pytest.mark.parametrize("body", [b"\n\n", b'{"text": ""}\n{"messages": []}\n'])
def test_no_documents(tmp_path, body):
    path = file_with(tmp_path, body)
    assert f"{path} holds no documents" in refusal(path, tmp_path)


def test_parquet_without_rows(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "e.parquet")
    assert "holds no documents" in refusal(tmp_path / "e.parquet", tmp_path)


BAD_ROWS = {
    "malformed": (b'{"text": "a"\n', "line 2 is not valid JSON: Expecting ',' delimiter"),
    "cut off": (b'{"text": "a b', "line 2 is not valid JSON: Unterminated string"),
    "not an object": (b'["a"]\n', "line 2 is not a JSON object"),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', "line 2 is not UTF-8"),
    "other keys": (
        b'{"body": "a", "id": 1}\n',
        "its keys are body, id: name the key of the text with --text-key",
    ),
    "no keys": (b"{}\n", "its keys are none"),
    "null": (b'{"text": null}\n', "line 2: 'text' is null"),
    "number": (b'{"text": 7}\n', "'text' holds a int, not a string"),
    "list": (b'{"text": [{"role": "user"}]}\n', "'text' holds a list, not a string; .* --messages-key"),
    "surrogate": (b'{"text": "a \\ud800"}\n', "line 2: 'text' holds an unpaired surrogate"),
    "chat, no template": (b'{"messages": [{"role": "user", "content": "a"}]}\n', "no chat template"),
    "chat as text": (b'{"messages": "a"}\n', "'messages' holds a str; chat is a list"),
    "chat of strings": (b'{"messages": ["a"]}\n', "holds a str as a message"),
    "ShareGPT": (b'{"messages": [{"from": "human", "value": "a"}]}\n', r"its keys: from, value"),
    "no content": (b'{"messages": [{"role": "user", "content": null}]}\n', "without role or content"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_row(case, tmp_path):
    body, expected = BAD_ROWS[case]
    path = file_with(tmp_path, GOOD + body)
    message = refusal(path, tmp_path)
    assert f"--valid-data {path}, line 2" in message
    assert re.search(expected, message), message


def test_row_of_another_file_format_is_named(tmp_path):
    array = file_with(tmp_path, json.dumps([{"text": "a"}, {"body": "b"}]).encode(), "array.json")
    assert f"{array}, row 2 has neither" in refusal(array, tmp_path)
    broken = file_with(tmp_path, b'[{"text": "a"},\n {"text" "b"}]', "broken.json")
    assert f"{broken} is not valid JSON: Expecting ':' delimiter (line 2, column 10)" in refusal(broken, tmp_path)
    table = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), table)
    assert f"{table}, row 2: 'text' is null" in refusal(table, tmp_path)
    assert f"{table}, row 1 has neither 'body' nor 'messages'; its keys are text:" in refusal(
        table, tmp_path, text_key="body"
    )


@pytest.mark.parametrize("name", ["cut.jsonl.zst", "cut.jsonl.gz", "cut.parquet", "other.jsonl.zst"])
def test_damaged_files(name, tmp_path):
    lines = b"".join(b'{"text": "a b c %d"}\n' % i for i in range(5000))
    path = tmp_path / name
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a b c"] * 500}), path)
        body = path.read_bytes()
    else:
        body = zstandard.compress(lines) if name.endswith(".zst") else gzip.compress(lines)
    path.write_bytes(lines if name.startswith("other") else body[: len(body) // 2])
    assert f"{path} cannot be read" in refusal(path, tmp_path)


def test_too_few_tokens_for_one_window(tmp_path):
    path = file_with(tmp_path, b'{"text": "a b c"}\n')
    dataset = prepare_dataset([str(path)], make_tokenizer(), seq_length=3, cache_dir=tmp_path / "cache")
    assert len(dataset) == 1
    with pytest.raises(MegapruneError, match="holds 4 tokens, but one window needs 5: .* smaller --seq-length"):
        prepare_dataset([str(path)], make_tokenizer(), seq_length=4, cache_dir=tmp_path / "cache")
    padded = prepare_dataset([str(path)], make_tokenizer(), seq_length=9, cache_dir=tmp_path / "cache", pad_last=True)
    assert len(padded) == 1


def test_tokenizer_without_end_of_text(tmp_path):
    message = refusal(file_with(tmp_path, GOOD), tmp_path, tokenizer=make_tokenizer(eos=None))
    assert "no end-of-text token" in message and "eos_token" in message


def test_chat_template_that_rejects_one_chat_of_many(tmp_path):
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}a b c"
    chats = [[{"role": role, "content": "a"}] for role in ("user", "user", "assistant", "user")]
    path = file_with(tmp_path, b"".join(json.dumps({"messages": chat}).encode() + b"\n" for chat in chats))
    message = refusal(path, tmp_path, tokenizer=make_tokenizer(chat_template=strict))
    assert f"{path}, line 3: the chat template rejects it (a user must begin)" in message


def test_chats_without_an_assistant(tmp_path):
    path = file_with(tmp_path, b'{"messages": [{"role": "user", "content": "a b c d e f"}]}\n')
    assert "no token carries loss" in refusal(path, tmp_path, tokenizer=make_tokenizer(chat_template=MARKED))


def test_failed_build_leaves_an_older_cache_alone(tmp_path):
    good = file_with(tmp_path, GOOD, "good.jsonl")
    bad = file_with(tmp_path, GOOD * 2000 + b"{", "bad.jsonl")
    cache_dir = tmp_path / "cache"
    prepare_dataset([str(good)], make_tokenizer(), seq_length=4, cache_dir=cache_dir)
    before = sorted(cache_dir.rglob("*"))
    with pytest.raises(MegapruneError, match="bad.jsonl, line 2001 is not valid JSON"):
        prepare_dataset([str(good), str(bad)], make_tokenizer(), seq_length=4, cache_dir=cache_dir)
    assert sorted(cache_dir.rglob("*")) == before
