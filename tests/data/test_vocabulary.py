"""Tokens that the tokenizer has and the model hasn't, for every tool and every kind of data."""

import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest

from megaprune.cli import main as cli
from megaprune.data.prepare import prepare_dataset
from megaprune.mcore import parallel
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny

# The last token that the model has, and one that it hasn't.
WITHIN, BEYOND = f"<|{tiny.VOCAB_SIZE - 1}|>", f"<|{tiny.VOCAB_SIZE}|>"


def extended_tokenizer():
    """Its last two tokens are beyond the model's vocabulary, in the rows that Megatron pads it with."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens([f"<|{number}|>" for number in range(len(tokenizer), tiny.VOCAB_SIZE + 2)])
    assert tokenizer.convert_tokens_to_ids(BEYOND) == tiny.VOCAB_SIZE
    return tokenizer


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended") / "model"
    shutil.copytree(tiny_model("qwen3_tied"), folder)
    extended_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Data of which one document holds such a token: by name train, or valid, which is good."""
    folder = tmp_path_factory.mktemp("beyond")
    tiny.make_data(folder / "valid.jsonl", rows=120, seed=3)
    text = (folder / "valid.jsonl").read_text()
    (folder / "train.jsonl").write_text(text + json.dumps({"text": f"if {BEYOND} else"}) + "\n")
    return folder


def said(where, size=tiny.VOCAB_SIZE):
    return f"{where}: the token '{BEYOND}' has id {tiny.VOCAB_SIZE}, and the model's vocabulary has {size} (vocab_size"


def chat(text):
    return [{"role": "user", "content": "is"}, {"role": "assistant", "content": text}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "messages"])
def test_the_document_is_named(tmp_path, kind, column):
    texts = [f"if {WITHIN} else", f"if {BEYOND} else"]
    rows = [{column: text if column == "text" else chat(text)} for text in texts]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    options = dict(seq_length=2, cache_dir=tmp_path / "cache", flag="--data")
    tokenizer = extended_tokenizer()
    with pytest.raises(MegapruneError) as met:
        prepare_dataset([str(path)], tokenizer, vocab_size=tiny.VOCAB_SIZE, **options)
    where = f"--data {path}, {'line' if kind == 'jsonl' else 'row'} 2"
    assert said(where) in str(met.value) and not (tmp_path / "cache").exists()
    # a cache that a larger model's run with this tokenizer left there
    prepare_dataset([str(path)], tokenizer, vocab_size=tiny.VOCAB_SIZE + 1, **options)
    with pytest.raises(MegapruneError) as met:
        prepare_dataset([str(path)], tokenizer, vocab_size=tiny.VOCAB_SIZE, **options)
    assert said(where) in str(met.value)


def test_the_end_of_text_token(tmp_path):
    tokenizer = extended_tokenizer()
    tokenizer.eos_token = BEYOND
    tiny.make_data(tmp_path / "a.jsonl", rows=20, seed=1)
    options = dict(seq_length=2, cache_dir=tmp_path / "cache", vocab_size=tiny.VOCAB_SIZE)
    with pytest.raises(MegapruneError) as met:
        prepare_dataset([str(tmp_path / "a.jsonl")], tokenizer, **options)
    assert said("the tokenizer's end-of-text token") in str(met.value)


def test_prune(model, data, tmp_path):
    argv = tiny.select_argv(model, data, tmp_path / "run", "shortgpt")
    with pytest.raises(MegapruneError) as met:
        tiny.run_here(argv)
    assert said(f"--train-data {data}/train.jsonl, line 121") in str(met.value)
    assert not (tmp_path / "run").exists()
    train, valid = argv.index("--train-data") + 1, argv.index("--valid-data") + 1
    argv[train], argv[valid] = argv[valid], argv[train]
    with pytest.raises(MegapruneError) as met:
        tiny.run_here(argv)
    assert said(f"--valid-data {data}/train.jsonl, line 121") in str(met.value)


def attempt(verb, **flags):
    words = [str(word) for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    try:
        return cli.attempt(verb, words)
    finally:
        if parallel.parallel_state.model_parallel_is_initialized():
            parallel.finish()


def test_the_other_tools(model, data, tmp_path):
    train, output = data / "train.jsonl", tmp_path / "out"
    common = dict(hf_model=model, seq_length=8)
    runs = {
        "cache-teacher": ("--train-data", dict(common, train_data=train, output=output)),
        "evaluate": ("--data", dict(common, data=train, output=output)),
        "preprocess-data": ("--input", dict(input=train, tokenizer=model, output_prefix=output, workers=1)),
    }
    for verb, (flag, flags) in runs.items():
        status, line = attempt(verb, **flags)
        assert status == 1 and line.startswith(f"{verb}: error: {said(f'{flag} {train}, line 121')}")
        assert not list(tmp_path.iterdir())


def test_a_tokenizer_without_its_model(model, data, tmp_path):
    """Nothing is known of the model: the dataset is written, and refused where a model is to read it."""
    extended_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = dict(input=data / "train.jsonl", tokenizer=tmp_path / "tokenizer", output_prefix=tmp_path / "p", workers=1)
    assert attempt("preprocess-data", **flags) == (0, None)
    status, line = attempt("evaluate", hf_model=model, seq_length=8, data=tmp_path / "p")
    assert status == 1
    assert f"--data {tmp_path}/p holds token 331, and the model's vocabulary has 331: preprocess" in line
    assert line.endswith("; see document 121")
