"""Pushing a model: the commit that a fake hub receives, and what is refused before anything is sent."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results

import megaprune
from megaprune.report.front_matter import split_card

TASKS = {"piqa": {"alias": "piqa", "acc,none": 0.7, "acc_stderr,none": 0.01, "acc_norm,none": 0.6975, "items": 200}}


class FakeHub:
    """Stand-in for HfApi: keeps what it is called with."""

    def __init__(self):
        self.calls, self.there, self.error = [], [], None

    def __call__(self, **_):
        return self

    def create_repo(self, repo_id, **given):
        if self.error:
            raise self.error
        self.calls.append(("repo", repo_id, given))

    def create_branch(self, repo_id, **given):
        self.calls.append(("branch", repo_id, given))

    def list_repo_files(self, repo_id, **given):
        return self.there

    def create_commit(self, repo_id, operations, **given):
        self.calls.append(("commit", repo_id, given))
        self.operations = {operation.path_in_repo: operation for operation in operations}
        return SimpleNamespace(pr_url=None, commit_url=f"https://huggingface.co/{repo_id}/commit/1")


@pytest.fixture
def hub(monkeypatch):
    fake = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    return fake


@pytest.fixture
def model(tiny_model, tmp_path):
    """A pruned model whose source, with a card of its own, was a private folder."""
    source = tmp_path / "private" / "source"
    source.mkdir(parents=True)
    for path in tiny_model("llama2").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "README.md").write_text("---\nlicense: other\nlicense_name: tiny\nlanguage: [en]\n---\n# Source\n")
    megaprune.remove_layers(source, layers=[1], save=tmp_path / "private" / "hf")
    return tmp_path / "private" / "hf"


def written(path, tasks):
    path.write_text(json.dumps({"hf_model": str(path), "tasks": tasks}))
    return path


def test_one_commit_has_the_model_and_its_card(hub, model):
    hub.there = ["README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.txt"]
    pushed = megaprune.push(model, "me/tiny", private=True, base_model="they/Source", revision="v2")
    assert [call[:2] for call in hub.calls] == [("repo", "me/tiny"), ("branch", "me/tiny"), ("commit", "me/tiny")]
    assert hub.calls[0][2] == {"private": True, "exist_ok": True}
    assert hub.calls[2][2]["revision"] == "v2"
    added = {name for name, each in hub.operations.items() if isinstance(each, huggingface_hub.CommitOperationAdd)}
    assert added == {path.name for path in model.iterdir()} == set(pushed.files)
    assert set(hub.operations) - added == set(pushed.deleted) == {*hub.there[1:3]}
    metadata = yaml.safe_load(hub.operations["README.md"].path_or_fileobj.decode().split("---\n")[1])
    assert metadata["base_model"] == "they/Source" and metadata["license_name"] == "tiny"
    assert "# they/Source, pruned to 5 of 6 layers\n\nThis model is `they/Source` without 1" in pushed.card
    assert pushed.notes == [] and pushed.commit.endswith("/commit/1")


def test_no_path_of_this_machine_is_in_the_card(model, tmp_path):
    card = (model / "README.md").read_text()
    assert "private" not in card and tmp_path.name not in card
    assert "megaprune.remove_layers(hf_model='source', layers=[1], save='hf')" in card


def test_a_dry_run_sends_nothing(hub, model):
    before = (model / "README.md").read_bytes()
    pushed = megaprune.push(model, "me/tiny", dry_run=True)
    assert hub.calls == [] and pushed.dry_run and "model.safetensors" in pushed.files
    assert "base_model" not in split_card(pushed.card)[0]
    assert len(pushed.notes) == 1 and "--base-model" in pushed.notes[0]
    assert 'from_pretrained("me/tiny")' in pushed.card
    assert (model / "README.md").read_bytes() == before


def test_scores_are_in_the_metadata_and_in_a_table(model, tmp_path):
    ours = written(tmp_path / "ours.json", TASKS | {"mine": {"acc,none": 0.5}})
    theirs = written(tmp_path / "theirs.json", {"piqa": {"acc,none": 0.8, "acc_norm,none": 0.81}})
    pushed = megaprune.push(model, "me/tiny", evaluation=ours, source_evaluation=theirs, dry_run=True)
    metadata, text = split_card(pushed.card)
    name, results = model_index_to_eval_results(metadata["model-index"])
    assert name == "tiny"
    found = {(each.dataset_type, each.metric_type): each.metric_value for each in results}
    assert found == {("ybisk/piqa", "acc"): 70.0, ("ybisk/piqa", "acc_norm"): 69.75, ("mine", "acc"): 50.0}
    assert results[0].dataset_args == {"num_items": 200}
    assert "| `piqa` | normalized accuracy | 200 | 81.00 | 69.75 |\n| `mine` | accuracy | - | - | 50.00 |" in text
    assert text.index("## Tasks") < text.index("## How it was made")


def test_pushing_again_replaces_the_scores(model, tmp_path):
    first = megaprune.push(model, "me/tiny", evaluation=written(tmp_path / "a.json", TASKS), dry_run=True)
    (model / "README.md").write_text(first.card)
    again = {"piqa": {"acc,none": 0.25}}
    card = megaprune.push(model, "me/tiny", evaluation=written(tmp_path / "b.json", again), dry_run=True).card
    assert card.count("## Tasks") == 1 and "25.00" in card and "70.00" not in card
    [entry] = split_card(card)[0]["model-index"][0]["results"]
    assert [metric["value"] for metric in entry["metrics"]] == [25.0]


def test_a_card_of_an_earlier_version_loses_its_paths(model):
    card = (model / "README.md").read_text()
    old = card.replace("library_name", "base_model: source\nlibrary_name").replace("save='hf'", "save='/home/me/hf'")
    (model / "README.md").write_text(old)
    pushed = megaprune.push(model, "me/tiny", dry_run=True)
    assert "base_model" not in split_card(pushed.card)[0] and "/home/me" not in pushed.card


@pytest.mark.parametrize(
    "damage, flags, said",
    [
        (lambda folder: None, {"repo_id": "tiny"}, "owner/name"),
        (lambda folder: None, {"license": "Apache 2"}, "apache-2.0"),
        (lambda folder: None, {"base_model": "/home/me/model"}, "--base-model"),
        (lambda folder: None, {"revision": "v2", "create_pr": True}, "--create-pr"),
        (lambda folder: None, {"source_evaluation": "x.json"}, "needs --evaluation"),
        (lambda folder: None, {"evaluation": "missing.json"}, "missing.json can't be read"),
        (lambda folder: (folder / "README.md").unlink(), {}, "no card by megaprune"),
        (lambda folder: (folder / "README.md").write_text("---\nlicense: mit\n---\n"), {}, "no card by megaprune"),
        (lambda folder: (folder / "config.json").unlink(), {}, "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), {}, "no weights"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), {}, "is an adapter"),
        (lambda folder: folder.rename(folder.with_name("hf_")) and (folder / "x").mkdir(parents=True), {}, "no config"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                '{"weight_map": {"a": "b.safetensors"}}'
            ),
            {},
            "lacks b.safetensors",
        ),
    ],
)
def test_refused_before_anything_is_sent(hub, model, damage, flags, said):
    damage(model)
    with pytest.raises(megaprune.MegapruneError, match=said):
        megaprune.push(model, **({"repo_id": "me/tiny"} | flags))
    assert hub.calls == []


def test_a_run_folder_is_told_from_its_model(hub, model):
    with pytest.raises(megaprune.MegapruneError, match="is a run folder: give .*hf"):
        megaprune.push(model.parent, "me/tiny")


def test_the_hubs_refusal_is_one_line(hub, model):
    hub.error = ValueError("401 Client Error.\n\nInvalid username")
    with pytest.raises(megaprune.MegapruneError, match="401 Client Error. Invalid username.*hf auth login"):
        megaprune.push(model, "me/tiny")
