"""Functions that the task files of this folder name: the harness imports this module by its path."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets

_LOGIQA = re.compile(
    r"Context: (?P<context>.*)\nQuestion: (?P<question>.*)\n"
    r"Choices: A\. (?P<a>.*)\nB\. (?P<b>.*)\nC\. (?P<c>.*)\nD\. (?P<d>.*?)\n?",
    re.DOTALL,
)


def load(file: str, data_dir: str | None = None, **metadata: Any) -> datasets.DatasetDict:
    """Return the items of a JSON-lines file as the split `test`.

    Args:
        data_dir: the folder of `file`, from the harness's `--metadata`; by default the folder of the task files.
        metadata: other metadata of the task, which the harness passes too.

    Raises:
        ValueError: a line is not a JSON object, or its `gold` is none of its choices; names the line.
    """
    path = (Path(data_dir) if data_dir else Path(__file__).parent) / file
    with path.open(encoding="utf-8") as lines:
        rows = [_item(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path} holds no items")
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def _item(line: str, where: str) -> dict[str, Any]:
    try:
        item = json.loads(line)
    except ValueError:
        item = None
    if not isinstance(item, dict):
        raise ValueError(f"{where} is not a JSON object")
    choices = item.get("choices", item.get("context_options"))
    if choices is not None and item.get("gold") not in range(len(choices)):
        raise ValueError(f"{where}: gold {item.get('gold')!r} is the index of none of its {len(choices)} choices")
    return item


def logiqa_docs(docs: Iterable[dict[str, Any]]) -> datasets.Dataset:
    """Return items with `context`, `question`, `options` and `gold`, of which the file has the first three in one."""
    return datasets.Dataset.from_list([_logiqa(doc) for doc in docs])


def logiqa_prompt(doc: dict[str, Any]) -> str:
    """Return the prompt of a LogiQA item: passage, question, lettered options."""
    options = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", doc["options"], strict=True))
    return f"Passage: {doc['context']}\nQuestion: {doc['question']}\nChoices:\n{options}Answer:"


def copa_prompt(doc: dict[str, Any]) -> str:
    """Return the premise and its connector without the comma between them, as the harness's own task has them."""
    return re.sub(r", (because|therefore)$", r" \1", doc["query"])


def _logiqa(doc: dict[str, Any]) -> dict[str, Any]:
    found = _LOGIQA.fullmatch(doc["query"])
    if found is None:
        raise ValueError(f"logiqa: no 'Context: ... Question: ... Choices: A. ...' in the item {doc['query'][:60]!r}")
    options = [found[letter] for letter in "abcd"]
    return {"context": found["context"], "question": found["question"], "options": options, "gold": doc["gold"]}
