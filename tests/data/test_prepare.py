"""Tokens from files: formats, chats and the cache, with a small byte-level tokenizer that is trained here."""

import gzip
import json
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megaprune.data import encoder, token_cache
from megaprune.data.prepare import prepare_dataset
from megaprune.utils.errors import MegapruneError

TEXTS = [f"document {i}: the quick brown fox jumps over the lazy dog {i * 7} times — naïve ✓" for i in range(40)]
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|bot|>{% generation %}{{ m['content'] }}<|eos|>"
    "{% endgeneration %}{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
)
PLAIN = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHATS = [
    [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": f"a number, {i}"}] for i in range(6)
]


def make_tokenizer(chat_template=None, eos="<|eos|>"):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|eos|>", "<|bos|>", "<|user|>", "<|bot|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=chat_template)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def prepare(paths, tokenizer, tmp_path, **options):
    options = {"seq_length": 16, "cache_dir": tmp_path / "cache", **options}
    return prepare_dataset([paths] if isinstance(paths, str) else paths, tokenizer, **options)


def decoded(dataset, tokenizer):
    """Return the documents without their end-of-text tokens; check that each one has it."""
    tokens, offsets = np.asarray(dataset.stream.tokens), dataset.document_offsets
    documents = [tokens[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


ROWS = [{"text": text, "id": i} for i, text in enumerate(TEXTS)]


def test_every_format_gives_the_same_documents(tokenizer, tmp_path):
    body = jsonl(ROWS)
    half = len(jsonl(ROWS[:20]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=7)
    compress = zstandard.ZstdCompressor().compress
    paths = {
        "jsonl": write(tmp_path / "a.jsonl", body),
        "bom, CRLF, blank lines": write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + body.replace(b"\n", b"\r\n\r\n")),
        "zst, two frames": write(tmp_path / "a.jsonl.zst", compress(body[:half]) + compress(body[half:])),
        "gz, two members": write(tmp_path / "a.jsonl.gz", gzip.compress(body[:half]) + gzip.compress(body[half:])),
        "json lines": write(tmp_path / "lines.json", body),
        "json array": write(tmp_path / "array.json", json.dumps(ROWS, indent=1).encode()),
        "json array, gz": write(tmp_path / "array.json.gz", gzip.compress(json.dumps(ROWS).encode())),
        "parquet": str(tmp_path / "a.parquet"),
    }
    found = {name: prepare(path, tokenizer, tmp_path) for name, path in paths.items()}
    for name, dataset in found.items():
        assert decoded(dataset, tokenizer) == TEXTS, name
    assert len({dataset.fingerprint for dataset in found.values()}) == 1


def test_folders_are_sorted_and_paths_keep_their_order(tokenizer, tmp_path):
    folder = tmp_path / "folder"
    write(folder / "b" / "2.jsonl", jsonl(ROWS[1:2]))
    write(folder / "a.jsonl.gz", gzip.compress(jsonl(ROWS[:1])))
    write(folder / "c.json", jsonl(ROWS[2:3]))
    write(folder / "README.md", b"not data")
    write(folder / ".cache" / "a.jsonl", b"hidden")
    single = write(tmp_path / "single.jsonl", jsonl(ROWS[3:4]))
    assert decoded(prepare(str(folder), tokenizer, tmp_path), tokenizer) == TEXTS[:3]
    both = prepare([single, str(folder)], tokenizer, tmp_path)
    assert decoded(both, tokenizer) == [TEXTS[3], *TEXTS[:3]]


def test_text_key_and_empty_documents(tokenizer, tmp_path):
    rows = [{"body": "", "text": 3}, {"body": TEXTS[0]}, {"body": TEXTS[1]}]
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    dataset = prepare(path, tokenizer, tmp_path, text_key="body")
    assert decoded(dataset, tokenizer) == TEXTS[:2]
    assert dataset.stream.loss_mask is None


def test_documents_longer_or_more_than_one_batch(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    whole = prepare(path, tokenizer, tmp_path)
    monkeypatch.setattr(encoder, "BATCH_DOCUMENTS", 3)
    monkeypatch.setattr(encoder, "BATCH_CHARACTERS", 150)
    pieces = prepare(path, tokenizer, tmp_path, cache_dir=tmp_path / "other")
    assert pieces.fingerprint == whole.fingerprint


def test_special_tokens_are_the_tokenizers_own_and_end_of_text_comes_once(tmp_path):
    tokenizer = make_tokenizer()
    bos, eos = tokenizer.convert_tokens_to_ids("<|bos|>"), tokenizer.eos_token_id
    path = write(tmp_path / "a.jsonl", jsonl(ROWS[:2]))
    for template, name in (("<|bos|> $A", "bos"), ("<|bos|> $A <|eos|>", "both")):
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<|bos|>", bos), ("<|eos|>", eos)]
        )
        dataset = prepare(path, tokenizer, tmp_path, cache_dir=tmp_path / name)
        tokens = np.asarray(dataset.stream.tokens)
        assert (tokens == eos).sum() == (tokens == bos).sum() == 2
        assert tokens[dataset.document_offsets[:-1]].tolist() == [bos, bos]
        assert tokens[dataset.document_offsets[1:] - 1].tolist() == [eos, eos]


def test_chat_with_generation_blocks_trains_on_the_assistant_alone(tmp_path):
    tokenizer = make_tokenizer(MARKED)
    path = write(tmp_path / "chat.jsonl", jsonl([{"messages": chat} for chat in CHATS]))
    dataset = prepare(path, tokenizer, tmp_path, seq_length=8, pad_last=True)
    tokens, mask = np.asarray(dataset.stream.tokens), np.asarray(dataset.stream.loss_mask)
    first = slice(*dataset.document_offsets[:2])
    assert tokenizer.decode(tokens[first]) == "<|user|>what is 0?<|bot|>a number, 0<|eos|>"
    assert tokenizer.decode(tokens[first][mask[first] == 1]) == "a number, 0<|eos|>"
    windows = [dataset.window(i) for i in range(len(dataset))]
    assert sum(loss.sum() for _, loss in windows) == mask.sum()  # the first token of all carries none
    seen = np.concatenate([window[1:][loss == 1] for window, loss in windows])
    assert np.array_equal(seen, tokens[mask == 1])


def test_chat_without_generation_blocks_trains_on_every_token(tmp_path):
    path = write(tmp_path / "chat.jsonl", jsonl([{"talk": chat} for chat in CHATS]))
    marked = prepare(path, make_tokenizer(MARKED), tmp_path, messages_key="talk")
    plain = prepare(path, make_tokenizer(PLAIN), tmp_path, messages_key="talk")
    assert plain.stream.loss_mask is None
    assert np.array_equal(plain.stream.tokens, marked.stream.tokens)
    assert plain.fingerprint != marked.fingerprint


def test_text_and_chat_mix_in_order_and_parquet_holds_chat(tmp_path):
    tokenizer = make_tokenizer(MARKED)
    rows = [
        {"text": TEXTS[0]},
        {"messages": CHATS[0]},
        {"text": None, "messages": CHATS[1]},
        {"text": TEXTS[1]},
    ]
    nothing = {"text": None, "messages": None, "id": 7}
    lines = prepare(write(tmp_path / "mixed.jsonl", jsonl(rows)), tokenizer, tmp_path)
    assert [text[:10] for text in decoded(lines, tokenizer)] == [
        "document 0",
        "<|user|>wh",
        "<|user|>wh",
        "document 1",
    ]
    assert lines.stream.loss_mask[: lines.document_offsets[1]].all()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([nothing | row for row in rows]), tmp_path / "mixed.parquet")
    parquet = prepare(str(tmp_path / "mixed.parquet"), tokenizer, tmp_path)
    assert parquet.fingerprint == lines.fingerprint


def test_hub_dataset_is_streamed_once(tokenizer, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def load_dataset(name, *, split, streaming, cache_dir):
        assert streaming and cache_dir.startswith(str(tmp_path))
        asked.append((name, split))
        return iter(ROWS)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *args, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for path in ("org/corpus-v1.5", "org/corpus-v1.5", "org/corpus-v1.5:validation", "corpus"):
        assert decoded(prepare(path, tokenizer, tmp_path), tokenizer) == TEXTS
    assert asked == [("org/corpus-v1.5", "train"), ("org/corpus-v1.5", "validation"), ("corpus", "train")]


def cache_folder(tmp_path):
    (folder,) = (tmp_path / "cache").iterdir()
    return folder


def files_of_cache(tmp_path):
    """Every file of the cache, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}


def test_cache_is_reused_at_any_sequence_length_by_a_fresh_process_and_after_a_move(tmp_path):
    first = make_tokenizer()
    # Truncation set in tokenizer.json is undone by the first call: the key must not depend on that.
    first.backend_tokenizer.enable_truncation(8)
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    built = prepare(path, first, tmp_path)
    assert decoded(built, first) == TEXTS
    moved = write(tmp_path / "elsewhere" / "a.jsonl", jsonl(ROWS))
    fresh = make_tokenizer()
    fresh.backend_tokenizer.enable_truncation(8)
    files = files_of_cache(tmp_path)
    for tokenizer in (first, fresh):
        again = prepare(moved, tokenizer, tmp_path, seq_length=5)
        assert again.fingerprint == built.fingerprint and again.tokens_total == built.tokens_total
    assert files_of_cache(tmp_path) == files


def test_cache_notices_other_data_keys_templates_and_tokenizers(tmp_path):
    rows = [{"text": text, "b": text[::-1]} for text in TEXTS]
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    prepare(path, make_tokenizer(), tmp_path)
    prepare(path, make_tokenizer(), tmp_path, text_key="b")
    prepare(path, make_tokenizer(PLAIN), tmp_path)
    prepare(path, make_tokenizer(eos="<|bos|>"), tmp_path)
    write(tmp_path / "a.jsonl", jsonl(rows).replace(b"fox", b"cat"))  # same size
    prepare(path, make_tokenizer(), tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 5


def test_large_sources_are_distinguished_by_size_and_time(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("megaprune.data.sources.HASHED_BYTES", 10)
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    prepare(path, tokenizer, tmp_path)
    prepare(path, tokenizer, tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    write(tmp_path / "a.jsonl", jsonl(ROWS[:30]))
    assert prepare(path, tokenizer, tmp_path).document_offsets.size == 31


@pytest.mark.parametrize("damage", ["tokens.bin", "document_offsets.bin", "loss_mask.bin", "meta.json", "gone"])
def test_damaged_cache_is_built_again(tmp_path, damage):
    tokenizer = make_tokenizer(MARKED)
    path = write(tmp_path / "chat.jsonl", jsonl([{"messages": chat} for chat in CHATS]))
    before = prepare(path, tokenizer, tmp_path).fingerprint
    folder = cache_folder(tmp_path)
    if damage == "gone":
        shutil.rmtree(folder)
    else:
        file = folder / damage
        file.write_bytes(file.read_bytes()[:-3])
    again = prepare(path, tokenizer, tmp_path)
    assert again.fingerprint == before and again.stream.loss_mask is not None
    assert cache_folder(tmp_path) == folder  # and nothing left beside it


def test_two_builders_at_once_end_in_one_cache(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    read = token_cache.read_documents

    def slow_reader(*args, **options):
        monkeypatch.setattr(token_cache, "read_documents", read)
        prepare(path, tokenizer, tmp_path)  # the other one, finishing first
        yield from read(*args, **options)

    monkeypatch.setattr(token_cache, "read_documents", slow_reader)
    assert decoded(prepare(path, tokenizer, tmp_path), tokenizer) == TEXTS
    cache_folder(tmp_path)


@pytest.mark.parametrize(("extra_tokens", "dtype"), [(0, "<u2"), (66_000, "<u4")])
def test_token_files_are_as_narrow_as_the_vocabulary_allows(tmp_path, extra_tokens, dtype):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(extra_tokens)])
    last = f"<extra{extra_tokens - 1}>" if extra_tokens else "end"
    path = write(tmp_path / "a.jsonl", jsonl([{"text": TEXTS[0] + last}]))
    dataset = prepare(path, tokenizer, tmp_path)
    assert dataset.stream.tokens.dtype == np.dtype(dtype)
    assert decoded(dataset, tokenizer) == [TEXTS[0] + last]


def test_short_work_prints_nothing(tokenizer, tmp_path, capfd):
    prepare(write(tmp_path / "a.jsonl", jsonl(ROWS)), tokenizer, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_unwritable_cache_is_named(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl(ROWS))
    blocked = write(tmp_path / "cache", b"a file, not a folder")
    with pytest.raises(MegapruneError, match="token cache cannot be written") as caught:
        prepare(path, tokenizer, tmp_path)
    assert blocked in str(caught.value)
