"""A model card made ready for the hub: metadata the hub accepts, task scores, and no path of this machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megaprune.report.card_results import Tasks, model_index, task_results, task_table
from megaprune.report.front_matter import join_card, split_card
from megaprune.report.model_card import MADE
from megaprune.report.public_names import is_hub_id, without_paths
from megaprune.utils.errors import UsageError

_TASKS = "## Tasks\n"
_COMMAND = re.compile(r"(?<=```bash\n).*?(?=\n```)", re.DOTALL)
_PLACE = '"path/to/this/model"'
_TITLE = re.compile(r"^# (.+), pruned to ", re.MULTILINE)
_RESULTS = "model-index"


@dataclass(frozen=True)
class Evaluations:
    """Task scores as `megaprune evaluate` writes them: of the model, and of its source where measured."""

    model: Tasks
    source: Tasks | None


def completed_card(card: str, repo_id: str, fields: Mapping[str, str], evaluations: Evaluations | None) -> str:
    """Return a card by `model_card`, of this version or an earlier one, ready for the hub.

    Args:
        fields: metadata that replaces the card's own: ``license`` and ``base_model``.

    Raises:
        UsageError: a field has a value that the hub does not know.
    """
    metadata, text = split_card(card)
    metadata = _identified(metadata, fields)
    results = [each for index in metadata.get(_RESULTS) or [] for each in index.get("results", [])]
    if evaluations is not None:
        results = [each for each in results if not _of_tasks(each)]
        results += [each for index in model_index("", task_results(evaluations.model)) for each in index["results"]]
        text = _with_tasks(text, evaluations)
    if results:
        metadata[_RESULTS] = [{"name": repo_id.rpartition("/")[2], "results": results}]
    text = _naming(text.replace(_PLACE, f'"{repo_id}"'), fields.get("base_model"))
    before, made, after = text.partition(MADE)
    return join_card(metadata, before + made + _COMMAND.sub(lambda found: without_paths(found[0]), after))


def notes_on(card: str) -> list[str]:
    """Return what a card lacks that the hub shows, and how to give it."""
    metadata, notes = split_card(card)[0], []
    if not metadata.get("license"):
        notes.append("the card has no license: give --license")
    if not metadata.get("base_model"):
        notes.append("the card names no base model, because the source was a folder: give --base-model owner/name")
    return notes


def _identified(metadata: Mapping[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    """Return the metadata with license and base model as given, first the fields that the hub shows first."""
    found = dict(metadata)
    if "license" in fields:
        for name in ("license", "license_name", "license_link"):
            found.pop(name, None)
        found = {"license": _license(fields["license"])} | found
    if "base_model" in fields:
        if not is_hub_id(fields["base_model"]):
            raise UsageError(f"--base-model {fields['base_model']!r} is not an id on the hub: give owner/name")
        found |= {"base_model": fields["base_model"], "base_model_relation": "finetune"}
    elif not is_hub_id(str(found.get("base_model"))):  # a folder's name, which the hub refuses
        found.pop("base_model", None)
        found.pop("base_model_relation", None)
    return found


def _naming(text: str, source: str | None) -> str:
    """Return the text with the source's id in place of its folder's name."""
    if source and (title := _TITLE.search(text)):
        text = text.replace(title[0], f"# {source}, pruned to ", 1)
        text = text.replace(f"This model is `{title[1]}`", f"This model is `{source}`", 1)
    return text


def _license(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise UsageError(
            f"--license {name!r} is not spelled as the hub spells licenses: apache-2.0, mit, llama3.1, ..."
        )
    return name


def _of_tasks(result: Mapping[str, Any]) -> bool:
    """Return whether an entry of the model index is a harness task, and not the run's own loss."""
    return "source" in result


def _with_tasks(text: str, evaluations: Evaluations) -> str:
    table = task_table(evaluations.model, evaluations.source)
    section = f"{_TASKS}\nScores of lm-evaluation-harness; shares of right answers are in percent.\n\n{table}\n\n"
    text = re.sub(rf"^{_TASKS}.*?(?=^## )", "", text, flags=re.DOTALL | re.MULTILINE)
    before, made, after = text.partition(MADE)
    return before + (section + made + after if made else f"\n{section.rstrip()}\n")
