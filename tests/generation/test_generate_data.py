"""Texts and chats that a model writes: what it writes, resumed work, and the refusals."""

import json
import sys

import pytest
import torch
from transformers import AutoTokenizer

import megaprune
from megaprune.cli import main as cli
from megaprune.data.sources import RowKeys, document_of, find_sources, read_rows
from megaprune.generation import engines
from megaprune.utils.errors import MegapruneError, UsageError
from tests.helpers import tiny

NEW_TOKENS = 6
TEXTS = ["if while yield", "return", "import os from as lambda None", "def f raise", "", "global"]
CHAT = [
    {"role": "system", "content": "not in"},
    {"role": "user", "content": "await async"},
    {"role": "assistant", "content": "replaced"},
    {"role": "user", "content": "del"},
    {"role": "assistant", "content": "replaced too"},
]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr("megaprune.device.torch_device", lambda: torch.device("cpu"))


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("qwen3_tied")


@pytest.fixture
def texts(tmp_path):
    return jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generate(model, output, prompts=None, **flags):
    """Return the rows, and the report of the call."""
    given = {"max_new_tokens": NEW_TOKENS, "batch_size": 2} | flags
    report = megaprune.generate_data(model, output, [] if prompts is None else [prompts], **given)
    return [json.loads(line) for line in output.read_text().splitlines()], report


def by_hand(model, tokens):
    """Return the greedy continuation of tokens that transformers writes for them alone, and whether it ended."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([tokens])
    unassigned = list(range(len(tokenizer), tiny.VOCAB_SIZE))
    written = (
        tiny.load_hf(model)
        .generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            suppress_tokens=unassigned,
            eos_token_id=tokenizer.all_special_ids,
            pad_token_id=0,
        )[0, len(tokens) :]
        .tolist()
    )
    ended = written[-1] in tokenizer.all_special_ids
    return written[:-1] if ended else written, ended


def decoded(model, tokens):
    return AutoTokenizer.from_pretrained(model).decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def test_texts_are_continued_as_by_transformers_one_by_one(model, texts, tmp_path):
    rows, report = generate(model, tmp_path / "out.jsonl", texts, temperature=0, prompt_tokens=4)
    tokenizer, new, cut = AutoTokenizer.from_pretrained(model), 0, 0
    for row, text in zip(rows, filter(None, TEXTS), strict=True):
        prompt = tokenizer(text).input_ids[:4]
        written, ended = by_hand(model, prompt)
        assert row == {"text": decoded(model, prompt + written)}
        new, cut = new + len(written), cut + (not ended)
    assert (report.samples, report.new_tokens, report.cut) == (5, new, cut)
    assert report.engine == "transformers" and report.tokens_per_second > 0


def test_answers_of_a_chat_are_replaced_one_after_another(model, tmp_path):
    extra = {"tools": [{"name": "f"}], "chat_template_kwargs": {"thinking": True}}
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT[1:2]}, {"messages": CHAT} | extra])
    rows, _ = generate(model, tmp_path / "out.jsonl", chats, temperature=0)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def answered(messages):
        tokens = tokenizer(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ).input_ids
        return [*messages, {"role": "assistant", "content": decoded(model, by_hand(model, tokens)[0])}]

    assert rows[0] == {"messages": answered(CHAT[1:2])}
    assert rows[1] == {"messages": answered([*answered(CHAT[:2]), CHAT[3]])} | extra


def test_a_chat_ends_before_it_exceeds_the_positions(model, tmp_path):
    long = {"role": "user", "content": "yield " * 200}
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": [CHAT[1], long]}, {"messages": [*CHAT[1:3], long]}])
    with pytest.raises(UsageError, match=r"chats\.jsonl, line 1: a prompt of .* beyond the 256 positions"):
        generate(model, tmp_path / "out.jsonl", chats)
    jsonl(chats, [{"messages": [*CHAT[1:3], long]}])
    [row], _ = generate(model, tmp_path / "out.jsonl", chats)
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


def test_a_model_asks_and_answers_by_itself(model, tmp_path):
    rows, _ = generate(model, tmp_path / "out.jsonl", chat=True, num_samples=3)
    roles = [[message["role"] for message in row["messages"]] for row in rows]
    assert roles == [["user", "assistant"]] * 3
    assert len({json.dumps(row) for row in rows}) == 3


def test_a_model_begins_texts_by_itself(model, tmp_path):
    rows, _ = generate(model, tmp_path / "out.jsonl", num_samples=1, temperature=0)
    start = AutoTokenizer.from_pretrained(model).eos_token_id  # it has no token for the beginning
    assert rows == [{"text": decoded(model, by_hand(model, [start])[0])}]


def test_the_output_is_training_data(model, texts, tmp_path):
    output = tmp_path / "out.jsonl"
    rows, _ = generate(model, output, texts)
    read = [document_of(row, RowKeys()) for row in read_rows(find_sources([str(output)], "-"), RowKeys(), "-", None)]
    assert [document.content for document in read] == [row["text"] for row in rows]


def test_samples_follow_from_seed_and_row_alone(model, texts, tmp_path):
    first, _ = generate(model, tmp_path / "a.jsonl", texts, num_samples=10, batch_size=3)
    second, _ = generate(model, tmp_path / "b.jsonl", texts, num_samples=10, batch_size=4)
    assert first == second
    assert first[:5] != first[5:]  # the same prompts again, with other draws
    other, _ = generate(model, tmp_path / "c.jsonl", texts, num_samples=10, batch_size=4, seed=7)
    assert first != other


@pytest.mark.parametrize("torn", ["", '{"index": 3, "ro', '{"index": 1, "row": {"text": "lost"}'])
def test_killed_work_goes_on_to_the_same_bytes(model, texts, tmp_path, monkeypatch, torn):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    generate(model, whole, texts, num_samples=7)
    unfinished = tmp_path / "stopped.jsonl.tmp"
    complete, calls = engines.TransformersEngine.complete, []

    def until_the_third(self, *given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return complete(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engines.TransformersEngine, "complete", until_the_third)
        generate(model, stopped, texts, num_samples=7)
    assert not stopped.exists() and len(unfinished.read_text().splitlines()) == 1 + 4
    with unfinished.open("a") as file:
        file.write(torn)
    monkeypatch.setattr(engines.TransformersEngine, "complete", lambda *given: calls.append(given) or complete(*given))
    generate(model, stopped, texts, num_samples=7)
    assert len(calls) == 3 + 2
    assert stopped.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.jsonl", "texts.jsonl", "whole.jsonl"]


def test_unfinished_work_of_other_settings_is_refused(model, texts, tmp_path):
    unfinished = tmp_path / "out.jsonl.tmp"
    unfinished.write_text('{"seed": 1}\n')
    with pytest.raises(MegapruneError, match=r"out\.jsonl\.tmp was begun with other settings \(.*seed.*\)"):
        generate(model, tmp_path / "out.jsonl", texts)
    unfinished.write_text("anything\nelse\n")
    with pytest.raises(MegapruneError, match=r"out\.jsonl\.tmp is not unfinished work of this command"):
        generate(model, tmp_path / "out.jsonl", texts)
    assert unfinished.read_text() == "anything\nelse\n"


def test_command_says_what_it_wrote(model, texts, tmp_path, capsys):
    output = tmp_path / "new" / "out.jsonl"
    words = ["--hf-model", model, "--prompts", texts, "--output", output, "--max-new-tokens", "3", "--bf16"]
    assert cli.attempt("generate-data", list(map(str, words))) == (0, None)
    assert f"{output}: 5 rows" in capsys.readouterr().out
    assert len(output.read_text().splitlines()) == 5
    status, line = cli.attempt("generate-data", list(map(str, words)))
    assert status == 1 and f"--output {output} already exists" in line


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ("--prompts no.jsonl", 2, "--prompts no.jsonl does not exist"),
        ("--prompts texts.jsonl --text-key body", 1, "has neither 'body' nor 'messages'"),
        ("--prompts texts.jsonl --chat", 2, "--chat can't be combined with --prompts"),
        ("--prompts texts.jsonl --output out.json", 2, "--output out.json: the rows are JSON lines"),
        ("--prompts texts.jsonl --output .", 2, "--output . is a folder"),
        ("--prompts texts.jsonl --hf-model nowhere", 1, "--hf-model nowhere does not exist"),
        ("--prompts texts.jsonl --max-new-tokens 255", 2, "beyond the 256 positions"),
        ("--prompts texts.jsonl --engine vllm", 2, "--engine vllm: vLLM is not installed"),
        ("--prompts texts.jsonl --engine tgi", 2, "--engine"),
        ("--prompts texts.jsonl --top-p 0", 2, "--top-p"),
        ("--prompts texts.jsonl --temperature -1", 2, "--temperature"),
        ("--prompts empty.jsonl", 1, "--prompts holds no documents"),
        ("--prompts tools.jsonl", 1, "tools.jsonl, line 1: a chat with a message of role 'tool' is not a prompt"),
        ("--prompts open.jsonl", 1, "open.jsonl, line 1: a chat must end with a message of the user"),
        ("", 2, "--num-samples is required without --prompts"),
    ],
)
def test_refused_in_one_line_and_nothing_is_written(model, texts, tmp_path, monkeypatch, words, status, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm", None)
    jsonl(tmp_path / "empty.jsonl", [{"text": ""}])
    jsonl(tmp_path / "tools.jsonl", [{"messages": [CHAT[1], {"role": "tool", "content": "4"}]}])
    jsonl(tmp_path / "open.jsonl", [{"messages": CHAT[:1]}])
    before = sorted(tmp_path.iterdir())
    given = ["--hf-model", str(model), "--output", "out.jsonl", *words.split()]
    found, line = cli.attempt("generate-data", given)
    assert found == status and said in line and "\n" not in line
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.gpu
@pytest.mark.serving
def test_vllm_writes_what_transformers_writes(model, texts, tmp_path, monkeypatch):
    monkeypatch.undo()  # the real device
    rows = [
        generate(model, tmp_path / f"{engine}.jsonl", texts, engine=engine, temperature=0)[0]
        for engine in ("transformers", "vllm")
    ]
    assert rows[0] == rows[1]
