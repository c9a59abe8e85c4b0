"""Items of the harness's benchmarks, written for these tests: in its own schema, and as JSON lines."""

import json
from pathlib import Path
from typing import Any

Item = dict[str, Any]


def _arc(question: str, options: list[str], answer: str) -> Item:
    labels = ["1", "2", "3", "4"] if answer.isdigit() else ["A", "B", "C", "D"]
    return {"question": question, "choices": {"text": options, "label": labels}, "answerKey": answer}


def _piqa(goal: str, right: str, wrong: str, label: int) -> Item:
    options = [right, wrong] if label == 0 else [wrong, right]
    return {"goal": goal, "sol1": options[0], "sol2": options[1], "label": label}


def _winogrande_item(sentence: str, first: str, second: str, answer: str) -> Item:
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def _copa_item(premise: str, first: str, second: str, question: str, label: int) -> Item:
    return {"premise": premise, "choice1": first, "choice2": second, "question": question, "label": label}


# As the datasets on the hub have them, which the harness's own task files read.
OWN: dict[str, list[Item]] = {
    "arc_easy": [
        _arc("What do plants take in to make sugar?", ["light", "sand", "iron", "glass"], "A"),
        _arc("A kettle boils. The water", ["freezes.", "becomes steam.", "turns red.", "gets heavy."], "2"),
        _arc("Which is a metal", ["wood", "wool", "copper", "water"], "C"),
    ],
    "piqa": [
        _piqa("dry a wet shoe", "fill it with paper", "fill it with soup", 0),
        _piqa("How do I open a jar? ", "turn the lid", "turn  the table", 1),
        _piqa("find north:\nat night", "look for the pole star", "look for the moon", 0),
    ],
    "winogrande": [
        {
            "sentence": "The cup broke the plate because the _ was hard.",
            "option1": "cup",
            "option2": "plate",
            "answer": "1",
        },
        {"sentence": "Ann thanked Sue since _ had helped", "option1": "Ann", "option2": "Sue", "answer": "2"},
    ],
    "boolq": [
        {"passage": "Tin melts at 232 degrees.\nLead at 327.", "question": "does tin melt before lead", "label": 1},
        {"passage": "A mile has 1609 metres.", "question": "is a mile shorter than a metre", "label": 0},
    ],
    "logiqa": [
        {
            "context": "All cats sleep. Tom is a cat.\nTom is grey.",
            "question": "Which follows?",
            "options": ["Tom sleeps.", "Tom is black.", "Cats are grey.", "None. It is open."],
            "label": "a",
        },
        {
            "context": "If it rains, the road is wet. The road is dry.",
            "question": "So what is true?",
            "options": ["It rains", "It doesn't rain", "The road is old", "It will rain"],
            "label": "b",
        },
    ],
    "openbookqa": [
        {
            "question_stem": "A magnet attracts",
            "choices": {"text": ["paper", "iron", "air", "milk"], "label": ["A", "B", "C", "D"]},
            "answerKey": "B",
        },
        {
            "question_stem": "Which is hot?",
            "choices": {"text": ["ice", "snow", "frost", "lava"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
    ],
    "copa": [
        {
            "premise": "The glass fell. ",
            "choice1": "It broke.",
            "choice2": "It flew.",
            "question": "effect",
            "label": 0,
        },
        {
            "premise": "I closed the window.",
            "choice1": "I was asleep.",
            "choice2": "It was cold.",
            "question": "cause",
            "label": 1,
        },
    ],
    "lambada_openai": [
        {"text": "He put the key in the lock and opened the door"},
        {"text": "Two and two, she said,\nand one more, make 5"},
    ],
    "gsm8k": [
        {"question": "Ann has 2 nets of 3 balls. How many?", "answer": "She has 2 * 3 = <<2*3=6>>6 balls.\n#### 6"},
        {"question": "Bob ate 1 of 4 figs. What is left?", "answer": "4 - 1 = <<4-1=3>>3 are left.\n#### 3"},
        {"question": "How many legs have 2 hens?", "answer": "2 * 2 = <<2*2=4>>4 legs.\n#### 4"},
    ],
}
OWN["arc_challenge"] = OWN["arc_easy"][::-1]
FILES = {"logiqa": "logi_qa", "openbookqa": "openbook_qa"}


def _multiple(query: str, options: list[str], gold: int) -> Item:
    return {"query": query, "choices": options, "gold": gold}


def _logiqa_query(item: Item) -> str:
    options = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", item["options"], strict=True))
    return f"Context: {item['context']}\nQuestion: {item['question']}\nChoices: {options}\n"


def _labelled(query: str, item: Item) -> Item:
    return _multiple(query, item["choices"]["text"], item["choices"]["label"].index(item["answerKey"]))


def _winogrande(item: Item) -> Item:
    before, after = item["sentence"].split("_")
    options = [before + item["option1"], before + item["option2"]]
    return {"context_options": options, "continuation": after.strip(), "gold": int(item["answer"]) - 1}


def _copa(item: Item) -> Item:
    word = {"cause": "because", "effect": "therefore"}[item["question"]]
    options = [item[key][0].lower() + item[key][1:] for key in ("choice1", "choice2")]
    return _multiple(f"{item['premise'].strip().rstrip('.')}, {word}", options, item["label"])


def _lambada(item: Item) -> Item:
    context, _, word = item["text"].rpartition(" ")
    return {"context": context, "continuation": word}


def _gsm8k(item: Item) -> Item:
    steps, _, answer = item["answer"].partition("\n#### ")
    return {"context": item["question"], "chain_of_thought": steps, "answer": answer}


# As the files that llm-foundry prepares have them.
AS_LINES = {
    "arc_easy": lambda item: _labelled(f"Question: {item['question']}", item),
    "arc_challenge": lambda item: _labelled(f"Question: {item['question']}", item),
    "piqa": lambda item: _multiple(f"Question: {item['goal']}\n", [item["sol1"], item["sol2"]], item["label"]),
    "winogrande": _winogrande,
    "boolq": lambda item: _multiple(
        f"Passage: {item['passage']}\nQuestion: {item['question']}?", ["no", "yes"], item["label"]
    ),
    "logiqa": lambda item: _multiple(_logiqa_query(item), ["A", "B", "C", "D"], "abcd".index(item["label"])),
    "openbookqa": lambda item: _labelled(item["question_stem"], item),
    "copa": _copa,
    "lambada_openai": _lambada,
    "gsm8k": _gsm8k,
}


def write_benchmarks(folder: Path) -> Path:
    """Write the items of every benchmark as JSON lines, under the names that llm-foundry's files have."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in OWN.items():
        lines = (json.dumps(AS_LINES[name](item)) + "\n" for item in items)
        (folder / f"{FILES.get(name, name)}.jsonl").write_text("".join(lines))
    return folder
