"""Preprocessing: the same bytes as Megatron-LM's own tool, at every number of workers, completely or not at all."""

import gzip
import json
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from tokenizers import processors
from transformers import AutoTokenizer

from megaprune.cli import main as cli
from megaprune.data import preprocess as encoding
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
TEXTS = ["one two", "", "naïve ✓ " * 50, "import return", "x"] * 30
# as AM-DeepSeek-R1-Distilled has them
INFO = {"source": "am-0309", "reference_answer": None, "test_case": None, "think_content": "t", "answer_content": "a"}
CHATS = [
    [
        {"role": "user", "content": f"what is {i}?", "info": INFO | {"think_content": None, "answer_content": None}},
        {"role": "assistant", "content": f"<think>{i}</think><answer>{i}</answer>", "info": INFO},
    ]
    for i in range(5)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_signal_handler():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def attempt(tokenizer, prefix, *words):
    words = ["--tokenizer", tokenizer, "--output-prefix", prefix, *words]
    return cli.attempt("preprocess-data", [str(word) for word in words])


def preprocess(tokenizer, prefix, *words):
    """Run the command and return the bytes of both files."""
    assert attempt(tokenizer, prefix, *words, "--workers", "1") == (0, None)
    return files(prefix)


def files(prefix):
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


def as_megatron_writes(tokenizer, texts, prefix):
    """Write a dataset like Megatron-LM's tools/preprocess_data.py with --append-eod, HuggingFaceTokenizer and
    special tokens, in one process."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
    for text in texts:
        ids, lengths = [], []
        found = tokenizer(text).input_ids
        if found:
            ids.extend(found)
            lengths.append(len(found))
        if ids:
            ids.append(tokenizer.eos_token_id)
            lengths[-1] += 1
        builder.add_document(ids, lengths)
    builder.finalize(f"{prefix}.idx")
    return files(prefix)


def documents(prefix):
    dataset = IndexedDataset(str(prefix))
    return [dataset[i].tolist() for i in range(len(dataset))]


@pytest.mark.parametrize("special", [None, "<|user|>"])
def test_bytes_equal_those_of_megatrons_tool(tokenizer, tmp_path, special):
    folder = tokenizer
    if special:  # a token that begins every text, as Llama's does
        folder = tmp_path / "tokenizer"
        made = tiny.make_tokenizer()
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special} $A", special_tokens=[(special, made.convert_tokens_to_ids(special))]
        )
        made.save_pretrained(folder)
    data = write(tmp_path / "a.jsonl", lines({"text": text} for text in TEXTS))
    found = preprocess(folder, tmp_path / "out" / "a", "--input", data)
    assert found == as_megatron_writes(folder, TEXTS, tmp_path / "theirs")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.bin", "a.idx"]


def test_every_format_gives_the_same_bytes(tokenizer, tmp_path):
    rows = [{"body": text, "id": i} for i, text in enumerate(TEXTS)]
    body, half = lines(rows), len(lines(rows[:20]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    write(tmp_path / "folder" / "1.jsonl", body[:half])
    write(tmp_path / "folder" / "2.jsonl.zst", zstandard.compress(body[half:]))
    inputs = {
        "jsonl": [write(tmp_path / "a.jsonl", body)],
        "zst": [write(tmp_path / "a.jsonl.zst", zstandard.compress(body))],
        "gz": [write(tmp_path / "a.jsonl.gz", gzip.compress(body))],
        "parquet": [tmp_path / "a.parquet"],
        "folder": [tmp_path / "folder"],
        "two": [tmp_path / "folder" / "1.jsonl", tmp_path / "folder" / "2.jsonl.zst"],
    }
    found = {
        name: preprocess(tokenizer, tmp_path / f"out-{name}", "--input", *paths, "--text-key", "body")
        for name, paths in inputs.items()
    }
    assert len(set(found.values())) == 1
    assert len(found["jsonl"][0]) > 1000


def test_hub_dataset_comes_through_the_datasets_library(tokenizer, tmp_path, monkeypatch):
    asked = []

    def load_dataset(name, split, streaming):
        asked.append((name, split, streaming))
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *a, **o: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = preprocess(tokenizer, tmp_path / "hub", "--input", "org/corpus:test")
    assert asked == [("org/corpus", "test", True)]
    assert found == as_megatron_writes(tokenizer, TEXTS, tmp_path / "theirs")


def test_chats_are_rendered_and_closed_once(tokenizer, tmp_path, capfd):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    eos = loaded.eos_token_id
    data = write(tmp_path / "a.jsonl", lines({"chat": chat} for chat in CHATS))
    words = ("--input", data, "--messages-key", "chat")
    preprocess(tokenizer, tmp_path / "own", *words)
    assert "every token will carry loss" in capfd.readouterr().out, "the template marks the assistant's"
    rendered = loaded.apply_chat_template(CHATS, return_dict=False)
    assert documents(tmp_path / "own") == rendered and all(d[-1] == eos != d[-2] for d in rendered)

    open_end = write(tmp_path / "open.jinja", b"{% for m in messages %}{{ m['content'] }}{% endfor %}")
    preprocess(tokenizer, tmp_path / "open", *words, "--chat-template", open_end)
    assert "carry loss" not in capfd.readouterr().out
    texts = ["".join(message["content"] for message in chat) for chat in CHATS]
    assert documents(tmp_path / "open") == [[*ids, eos] for ids in loaded(texts).input_ids]

    newline = write(tmp_path / "line.jinja", b"{% for m in messages %}{{ m['content'] }}<|eos|>\n{% endfor %}")
    preprocess(tokenizer, tmp_path / "line", *words, "--chat-template", newline)
    assert all(document[-2] == eos != document[-1] for document in documents(tmp_path / "line"))


def test_shipped_template_keeps_the_reasoning(tokenizer, tmp_path):
    template = ROOT / "examples" / "data" / "deepseek-r1-reasoning.jinja"
    data = write(tmp_path / "a.jsonl", lines({"messages": chat} for chat in CHATS))
    preprocess(tokenizer, tmp_path / "a", "--input", data, "--chat-template", template)
    decode = AutoTokenizer.from_pretrained(tokenizer).decode
    assert [decode(document) for document in documents(tmp_path / "a")] == [
        f"<｜User｜>what is {i}?<｜Assistant｜><think>{i}</think><answer>{i}</answer><|eos|>" for i in range(5)
    ]


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes(recipe, tokenizer, tmp_path, monkeypatch):
    """Each recipe is run on a row of its dataset's format."""
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(recipe.read_text())
    row = {"messages": CHATS[0]} if "messages_key" in settings else {"text": "one", "score": 3.5}
    write(Path(settings["input"]) / "a.jsonl.zst", zstandard.compress(lines([row])))
    assert cli.attempt(
        "preprocess-data", ["--config", str(recipe), "--tokenizer", str(tokenizer), "--workers", "1"]
    ) == (0, None)
    assert len(documents(settings["output_prefix"])) == 1


def test_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(65_600)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = write(tmp_path / "a.jsonl", lines([{"text": "one <extra65599>"}]))
    preprocess(tmp_path / "tokenizer", tmp_path / "a", "--input", data)
    dataset = IndexedDataset(str(tmp_path / "a"))
    assert dataset.index.dtype == np.int32 and dataset[0][-2:].tolist() == [len(tokenizer) - 1, 0]


def test_workers_change_nothing_and_name_the_first_bad_line(tokenizer, tmp_path, capfd):
    rows = [{"text": text * (i % 7 + 1)} for i, text in enumerate(TEXTS * 20)]
    good = write(tmp_path / "good.jsonl", lines(rows))
    bad = write(tmp_path / "bad.jsonl", lines([*rows, {"body": "no text"}, *rows, {"text": 3}]))
    alone = preprocess(tokenizer, tmp_path / "one", "--input", good)
    capfd.readouterr()
    assert attempt(tokenizer, tmp_path / "two", "--input", good, "--workers", 2) == (0, None)
    out = capfd.readouterr().out
    assert out.startswith(f"{tmp_path / 'two'}.bin and .idx: 3,000 documents, ") and out.endswith(" tokens/s)\n")
    assert files(tmp_path / "two") == alone
    status, line = attempt(tokenizer, tmp_path / "new" / "bad", "--input", bad, "--workers", 2)
    assert status == 1
    assert f"--input {bad}, line 3001 has neither 'text' nor 'messages'; its keys are body" in line
    assert not (tmp_path / "new").exists()


def test_terminated_run_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    data, out = write(tmp_path / "a.jsonl", lines([{"text": "import return"}] * 2000)), tmp_path / "new" / "out"
    seen, encode_rows = [], encoding.encode_rows

    def terminated(*args):
        batches = encode_rows(*args)
        yield next(batches)
        seen.extend(path.name for path in out.iterdir())
        os.kill(os.getpid(), signal.SIGTERM)
        yield from batches

    monkeypatch.setattr(encoding, "encode_rows", terminated)
    with pytest.raises(SystemExit) as ended:
        attempt(tokenizer, out / "a", "--input", data, "--workers", 1)
    assert ended.value.code == 128 + signal.SIGTERM
    seen.remove(".a.lock")
    assert seen and all(name.startswith(".") and ".tmp." in name for name in seen), "nothing has its name yet"
    assert not out.parent.exists()


GOOD = lines([{"text": "one"}])
REFUSED = {
    "no input": (2, {"--input": None}, "--input is required"),
    "no tokenizer": (2, {"--tokenizer": None}, "--tokenizer is required"),
    "no output": (2, {"--output-prefix": None}, "--output-prefix is required"),
    "workers": (2, {"--workers": "0"}, "--workers 0 is less than 1"),
    "folder as prefix": (2, {"--output-prefix": "{tmp}/out/"}, "without .bin or .idx, not a folder's"),
    "ending": (2, {"--output-prefix": "{tmp}/out.bin"}, "without .bin or .idx"),
    "output there": (1, {"--output-prefix": "{tmp}/there"}, "{tmp}/there.idx already exists; remove it first"),
    "output in a file": (1, {"--output-prefix": "{tmp}/good.jsonl/a"}, "good.jsonl/a can't be written"),
    "no such input": (2, {"--input": "{tmp}/none.jsonl"}, "none.jsonl does not exist"),
    "empty input": (2, {"--input": "{tmp}/empty.jsonl"}, "empty.jsonl is empty (0 bytes)"),
    "empty rows": (1, {"--input": "{tmp}/rows.jsonl"}, "rows.jsonl holds no documents: every row is empty"),
    "blank lines": (1, {"--input": "{tmp}/blank.jsonl"}, "blank.jsonl holds no documents"),
    "missing key": (1, {"--text-key": "body"}, "good.jsonl, line 1 has neither 'body' nor 'messages'"),
    "not JSON": (1, {"--input": "{tmp}/broken.jsonl"}, "broken.jsonl, line 2 is not valid JSON"),
    "cut off": (1, {"--input": "{tmp}/cut.jsonl.zst"}, "cut.jsonl.zst cannot be read"),
    "no template": (
        1,
        {"--input": "{tmp}/chat.jsonl", "--tokenizer": "{tmp}/plain"},
        "the tokenizer has no chat templ",
    ),
    "template": (2, {"--chat-template": "{tmp}/none.jinja"}, "--chat-template {tmp}/none.jinja is not a file"),
    "bad template": (
        1,
        {"--input": "{tmp}/chat.jsonl", "--chat-template": "{tmp}/bad.jinja"},
        "chat.jsonl, line 1: the chat template rejects it",
    ),
    "not a tokenizer": (1, {"--tokenizer": "{tmp}/nothing"}, "--tokenizer {tmp}/nothing holds no tokenizer"),
    "no eos": (1, {"--tokenizer": "{tmp}/no-eos"}, "has no end-of-text token"),
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("workshop")
    bodies = {
        "good.jsonl": GOOD,
        "there.idx": b"old",
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n",
        "rows.jsonl": b'{"text": ""}\n{"messages": []}\n',
        "broken.jsonl": GOOD + b'{"text"',
        "cut.jsonl.zst": zstandard.compress(lines([{"text": str(i)} for i in range(20_000)]))[:-30],
        "chat.jsonl": lines([{"messages": CHATS[0]}]),
        "bad.jinja": b"{{ raise_exception('no') }}",
    }
    for name, body in bodies.items():
        write(tmp / name, body)
    (tmp / "nothing").mkdir()
    made = tiny.make_tokenizer()
    made.chat_template = None
    made.save_pretrained(tmp / "plain")
    made.eos_token = None
    made.save_pretrained(tmp / "no-eos")
    return tmp


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case, workshop, tokenizer, tmp_path):
    status, flags, said = REFUSED[case]
    flags = {
        "--input": workshop / "good.jsonl",
        "--tokenizer": tokenizer,
        "--output-prefix": tmp_path / "out" / "a",
        "--workers": 1,
    } | flags
    words = [str(word).format(tmp=workshop) for pair in flags.items() if pair[1] is not None for word in pair]
    before = sorted(workshop.rglob("*"))
    found, line = cli.attempt("preprocess-data", words)
    assert found == status and said.format(tmp=workshop) in line
    assert sorted(workshop.rglob("*")) == before and not list(tmp_path.iterdir())
