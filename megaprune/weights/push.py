"""Pushing a pruned model to the Hugging Face Hub: the folder is checked, its card completed, and one commit made."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megaprune.report.card_edit import Evaluations, completed_card, notes_on
from megaprune.report.front_matter import CARD_NAME, split_card
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.utils.text import first_line
from megaprune.weights.hub import check_link, looks_like_hub_id

_INDEX, _WEIGHTS = "model.safetensors.index.json", ".safetensors"
_MAIN = "main"


@dataclass(frozen=True)
class Destination:
    """The place of a model on the hub.

    Args:
        repo_id: owner/name.
        revision: a branch, other than main.
        create_pr: open a pull request instead of changing the branch.
    """

    repo_id: str
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str | None = None


@dataclass(frozen=True)
class Pushed:
    """A model that was sent, or with `dry_run` would be.

    Args:
        files: sizes in bytes by name in the repository.
        deleted: weights of an earlier push that the model no longer has; unknown in a dry run.
        notes: what the card lacks that the hub shows, and the flag that gives it.
        commit: the commit's or the pull request's address.
    """

    repo_id: str
    url: str
    files: dict[str, int]
    card: str
    notes: list[str]
    dry_run: bool
    deleted: list[str]
    commit: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the values as plain data."""
        return asdict(self)


def push(
    folder: Path,
    to: Destination,
    fields: Mapping[str, str | None],
    evaluation: Path | None,
    source_evaluation: Path | None,
    dry_run: bool,
) -> Pushed:
    """Send a model to the hub. See `megaprune.api.push`.

    Args:
        fields: fields of the card's metadata that replace those in the folder's card, where not None.
    """
    _check_destination(to)
    files = _files(folder)
    evaluations = None
    if evaluation is not None:
        evaluations = Evaluations(_tasks(evaluation), None if source_evaluation is None else _tasks(source_evaluation))
    given = {name: value for name, value in fields.items() if value is not None}
    card = completed_card(_card(folder), to.repo_id, given, evaluations)
    sizes = {name: path.stat().st_size for name, path in files.items()} | {CARD_NAME: len(card.encode())}
    url, notes = f"https://huggingface.co/{to.repo_id}", notes_on(card)
    if dry_run:
        return Pushed(to.repo_id, url, sizes, card, notes, True, [])
    deleted, commit = _sent(lambda: _commit(to, files, card), to.repo_id)
    return Pushed(to.repo_id, url, sizes, card, notes, False, deleted, commit)


def _check_destination(to: Destination) -> None:
    if not looks_like_hub_id(to.repo_id):
        raise UsageError(f"--repo-id {to.repo_id!r} is not an id on the hub: give owner/name")
    if to.create_pr and to.revision not in (None, _MAIN):
        raise UsageError("--create-pr and --revision exclude each other: a pull request has a branch of its own")


def _files(folder: Path) -> dict[str, Path]:
    """Return the files to send by their names in the repository."""
    if (folder / "hf" / "config.json").is_file() and not (folder / "config.json").exists():
        raise MegapruneError(f"--hf-model {folder} is a run folder: give {folder / 'hf'}")
    if (folder / "adapter_config.json").is_file():
        raise MegapruneError(f"--hf-model {folder} is an adapter, not a model: merge it into its model first")
    if not (folder / "config.json").is_file():
        raise MegapruneError(f"--hf-model {folder} has no config.json: give the hf/ folder of a run")
    names = {path.relative_to(folder): path for path in sorted(folder.rglob("*"))}
    for path in names.values():
        check_link(path)
    hidden = {name for name in names if any(part.startswith(".") for part in name.parts)}
    found = {name.as_posix(): path for name, path in names.items() if path.is_file() and name not in hidden}
    _check_weights(folder, found)
    return found


def _check_weights(folder: Path, files: Mapping[str, Path]) -> None:
    if _INDEX in files:
        try:
            wanted = set(json.loads(files[_INDEX].read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise MegapruneError(f"{files[_INDEX]} is damaged: export the model again") from None
        if missing := sorted(wanted - files.keys()):
            raise MegapruneError(f"--hf-model {folder} lacks {missing[0]}, which its index names: export it again")
    elif not any(name.endswith(_WEIGHTS) for name in files):
        raise MegapruneError(f"--hf-model {folder} has no weights (*.safetensors): give the hf/ folder of a run")


def _card(folder: Path) -> str:
    path = folder / CARD_NAME
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "megaprune" not in split_card(card)[0]:
        raise MegapruneError(
            f"--hf-model {folder} has no card by megaprune: copy {CARD_NAME} from the hf/ folder of the run"
        )
    return card


def _tasks(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MegapruneError(
            f"{path} can't be read ({first_line(error)}): give a file of `megaprune evaluate`"
        ) from None
    tasks = found.get("tasks") if isinstance(found, dict) else None
    if not isinstance(tasks, dict) or not all(isinstance(metrics, dict) for metrics in tasks.values()):
        raise MegapruneError(f"{path} has no task scores: give a file of `megaprune evaluate --tasks ... --output`")
    return tasks


def _commit(to: Destination, files: Mapping[str, Path], card: str) -> tuple[list[str], str]:
    """Make the repository and the branch where they do not exist, and one commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(library_name="megaprune")
    api.create_repo(to.repo_id, private=to.private, exist_ok=True)
    if to.revision not in (None, _MAIN):
        api.create_branch(to.repo_id, branch=to.revision, exist_ok=True)
    there = api.list_repo_files(to.repo_id, revision=to.revision)
    stale = [name for name in there if name not in files and (name.endswith(_WEIGHTS) or name == _INDEX)]
    operations: list[Any] = [CommitOperationDelete(name) for name in stale]
    for name, path in files.items():
        operations.append(CommitOperationAdd(name, card.encode() if name == CARD_NAME else str(path)))
    layers = split_card(card)[0]["megaprune"].get("kept_layers") or ()
    message = to.message or f"Model pruned to {len(layers)} layers"
    made = api.create_commit(
        to.repo_id,
        operations,
        commit_message=message,
        revision=to.revision,
        create_pr=to.create_pr,
    )
    return stale, str(made.pr_url or made.commit_url)


def _sent(send: Callable[[], tuple[list[str], str]], repo_id: str) -> tuple[list[str], str]:
    try:
        return send()
    except Exception as error:  # no network, no login, no right to write, a card that the hub refuses
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MegapruneError(
            f"--repo-id {repo_id}: the hub did not take the model ({reason}): log in with `hf auth login` or set "
            "HF_TOKEN if it asks for that; the same command tries again"
        ) from None
