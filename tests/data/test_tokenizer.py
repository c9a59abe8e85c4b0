"""The loader of tokenizers, and its error messages."""

import base64
import io
import json
import sys

import pytest
import sentencepiece

from megaprune.cli import main as cli
from megaprune.data.tokenizer import model_vocabulary, tokenizer_in
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny

LLAMA, QWEN = {"model_type": "llama", "vocab_size": 32000}, {"model_type": "qwen2"}


def sentencepiece_model():
    model = io.BytesIO()
    sentences = iter(["hello world import def class"] * 50 + ["a b c d e f g"] * 20)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    return model.getvalue()


SPM = sentencepiece_model()
TIKTOKEN = "".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)).encode()
CUSTOM = {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}, "tokenizer_class": "OwnTokenizer"}


def folder_of(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def test_a_sentencepiece_model_alone(tmp_path):
    files = {
        "config.json": LLAMA,
        "tokenizer.model": SPM,
        "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"},
    }
    tokenizer = tokenizer_in(folder_of(tmp_path / "model", files), False)
    wanted = sentencepiece.SentencePieceProcessor(model_proto=SPM).encode("hello world")
    assert tokenizer("hello world", add_special_tokens=False)["input_ids"] == wanted


REFUSED = {
    "none": ({}, "holds no tokenizer that can be loaded: there is neither a tokenizer.json nor another vocabulary"),
    "none of a class that begins empty": (
        {"config.json": QWEN},
        "holds no tokenizer that can be loaded: there is neither a tokenizer.json nor another vocabulary",
    ),
    "a vocabulary that nothing reads": (
        {"config.json": QWEN, "qwen.tiktoken": TIKTOKEN},
        "holds no tokenizer that can be loaded: transformers reads no vocabulary from qwen.tiktoken; give a",
    ),
    "damaged sentencepiece": (
        {"tokenizer.model": SPM[:90], "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
        "holds no tokenizer that can be loaded: tokenizer.model is damaged: sentencepiece can't read it",
    ),
    "damaged": (
        {"tokenizer.json": b'{"version": "1.'},
        "holds no tokenizer that can be loaded: tokenizer.json is damaged (Unterminated string",
    ),
    "damaged config": (
        {"tokenizer.json": b"{}", "tokenizer_config.json": b"{"},
        "holds no tokenizer that can be loaded: tokenizer_config.json is damaged (",
    ),
    "another's": (
        {"tokenizer.json": {"version": "1.0", "added_tokens": [], "model": {"type": "Own"}}},
        "holds no tokenizer that can be loaded: tokenizer.json exists, but transformers rejects it (",
    ),
    "code": (
        {"tokenizer.model": SPM, "tokenizer_config.json": CUSTOM},
        "contains code: review it, then pass --trust-remote-code",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(tmp_path, case):
    files, problem = REFUSED[case]
    folder = folder_of(tmp_path / "model", {"config.json": LLAMA} | files)
    with pytest.raises(MegapruneError) as met:
        tokenizer_in(folder, False)
    assert str(folder) in str(met.value) and problem in str(met.value) and "\n" not in str(met.value)


@pytest.fixture
def without(monkeypatch):
    """Make a package unavailable."""

    def take(package):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, package, None)

    return take


MISSING = {
    "tiktoken": ({"tokenizer.model": TIKTOKEN}, "tiktoken", "pip install megaprune[tiktoken]"),
    "tiktoken by name": ({"tiktoken.model": TIKTOKEN}, "tiktoken", "pip install megaprune[tiktoken]"),
    "sentencepiece": (
        {"tokenizer.model": SPM, "tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}},
        "sentencepiece",
        "pip install sentencepiece",
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_missing_packages(tmp_path, without, case):
    files, package, install = MISSING[case]
    folder = folder_of(tmp_path / "model", {"config.json": LLAMA} | files)
    without(package)
    with pytest.raises(MegapruneError) as met:
        tokenizer_in(folder, False)
    assert str(met.value) == f"the tokenizer in {folder} needs the package {package}: {install}"


def test_every_tool_reports_the_same_error(tmp_path, tiny_model, without):
    """The model's tokenizer needs a package that is not installed."""
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("qwen3_tied"), folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    folder_of(folder, {"tokenizer.model": TIKTOKEN})
    without("tiktoken")
    tiny.make_data(tmp_path / "a.jsonl", rows=20, seed=1)
    wanted = f"{folder} needs the package tiktoken: pip install megaprune[tiktoken]"
    words = {
        "evaluate": ["--hf-model", folder, "--data", tmp_path / "a.jsonl", "--seq-length", 8],
        "preprocess-data": ["--tokenizer", folder, "--input", tmp_path / "a.jsonl", "--output-prefix", tmp_path / "p"],
    }
    for verb, flags in words.items():
        status, line = cli.attempt(verb, [str(word) for word in flags])
        assert status == 1 and line.endswith(wanted)
    with pytest.raises(MegapruneError, match="needs the package tiktoken"):
        tiny.run_here(tiny.select_argv(folder, tmp_path, tmp_path / "run", "shortgpt"))
    assert not (tmp_path / "run").exists()


def test_the_vocabulary_beside_a_tokenizer(tmp_path):
    assert model_vocabulary(folder_of(tmp_path / "a", {"config.json": LLAMA})) == 32000
    assert model_vocabulary(folder_of(tmp_path / "b", {"config.json": QWEN})) is None
    assert model_vocabulary(folder_of(tmp_path / "c", {"config.json": b"{"})) is None
    assert model_vocabulary(tmp_path / "d") is None
