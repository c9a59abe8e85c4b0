"""Folders, Hub ids, and broken links."""

import json

import huggingface_hub
import pytest

from megaprune.data.blend import find_blend, open_blend
from megaprune.data.sources import FileSource, HubSource, find_sources
from megaprune.evaluation.perplexity import evaluate_model
from megaprune.utils.errors import MegapruneError
from megaprune.weights.hub import resolve_hf_model
from megaprune.weights.source import HFSource
from tests.helpers import tiny


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Stand-in for the Hub, which has only Qwen/Qwen3-8B; the user's folder; and the recorded requests."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "config.json").write_text("{}")
    asked = []

    def download(name, **wanted):
        asked.append((name, wanted))
        if name != "Qwen/Qwen3-8B":
            raise OSError("404 Client Error\nmore")
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here", tmp_path / "cache", asked


def owner_folder(here):
    (here / "Qwen").mkdir()


def same_file(here):
    owner_folder(here)
    (here / "Qwen" / "Qwen3-8B").write_text("notes")


def same_link(here):
    owner_folder(here)
    (here / "Qwen" / "Qwen3-8B").symlink_to("/no/such/folder")


@pytest.mark.parametrize("prepare", [lambda here: None, owner_folder, same_file, same_link])
def test_an_id_is_an_id_unless_the_folder_is_there(hub, prepare):
    here, cache, asked = hub
    prepare(here)
    assert resolve_hf_model("Qwen/Qwen3-8B") == cache
    assert [name for name, _ in asked] == ["Qwen/Qwen3-8B"]


def test_tokenizers_may_have_no_owner(hub):
    with pytest.raises(MegapruneError, match="--tokenizer gpt2 is not a folder, and the hub does not provide it: 404"):
        resolve_hf_model("gpt2", flag="--tokenizer", tokenizer_only=True)
    [(name, wanted)] = hub[2]
    assert name == "gpt2" and "*.safetensors" in wanted["ignore_patterns"]


def test_the_folder_itself_goes_first(hub):
    here, _, asked = hub
    (here / "Qwen" / "Qwen3-8B").mkdir(parents=True)
    assert str(resolve_hf_model("Qwen/Qwen3-8B")) == "Qwen/Qwen3-8B" and not asked


@pytest.mark.parametrize(
    "name", ["/no/model", "./Qwen/Qwen3-8B", "~/model", "none", "a/b/c", "Other/", "Qwen/-x", "a/b--c"]
)
def test_paths_are_not_asked_for(hub, name):
    owner_folder(hub[0])
    with pytest.raises(MegapruneError, match="does not exist: give an HF model folder or a hub id"):
        resolve_hf_model(name)
    assert not hub[2]


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: None, "is not a folder, and the hub does not provide it: 404 Client Error"),
        (lambda path: path.write_text(""), "is not a folder here, and the hub"),
        (lambda path: path.symlink_to("/no/such"), "is a link to /no/such, which does not exist here, and the hub"),
    ],
)
def test_what_is_neither_is_named_as_it_is(hub, prepare, said):
    (hub[0] / "models").mkdir()
    prepare(hub[0] / "models" / "mine")
    with pytest.raises(MegapruneError, match=f"^--tokenizer models/mine {said}"):
        resolve_hf_model("models/mine", flag="--tokenizer")


def dangle(path):
    target = path.with_name("blob-of-" + path.name)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    return f"{path} is a link to {target}, which does not exist"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "model-00001-of-00002.safetensors"]
)
def test_links_to_nothing_in_a_model(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    said = dangle(tmp_path / name)
    for read in (resolve_hf_model, HFSource, lambda folder: evaluate_model(folder, ["x.jsonl"])):
        with pytest.raises(MegapruneError) as met:
            read(str(tmp_path))
        assert said in str(met.value)


def test_links_that_nothing_reads_are_let_be(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        dangle(tmp_path / name)
    assert resolve_hf_model(str(tmp_path)) == tmp_path
    dangle(tmp_path / "model.safetensors")
    assert resolve_hf_model(str(tmp_path), config_only=True) == tmp_path


def test_links_to_nothing_in_data(tmp_path):
    tiny.make_data(tmp_path / "a.jsonl", rows=2, seed=0)
    said = dangle(tmp_path / "b.jsonl")
    for given in (tmp_path, tmp_path / "b.jsonl"):
        with pytest.raises(MegapruneError) as met:
            find_sources([str(given)], "--train-data")
        assert said in str(met.value) and str(met.value).startswith("--train-data ")


def test_links_to_nothing_in_preprocessed_data(tmp_path):
    said = [dangle(tmp_path / f"p.{ending}") for ending in ("bin", "idx")]
    blend = find_blend([str(tmp_path / "p")], "--train-data")
    with pytest.raises(MegapruneError) as met:
        open_blend(blend, "--train-data", 8, None)
    assert said[0] in str(met.value)


def test_dataset_ids(hub):
    here = hub[0]
    (here / "org").mkdir()
    assert find_sources(["org/corpus", "org/corpus:test"], "--data") == [
        HubSource("org/corpus", "train"),
        HubSource("org/corpus", "test"),
    ]
    (here / "org" / "corpus").symlink_to("/no/such")
    assert find_sources(["org/corpus"], "--data") == [HubSource("org/corpus", "train")]
    (here / "org" / "corpus").unlink()
    (here / "org" / "corpus").mkdir()
    tiny.make_data(here / "org" / "corpus" / "a.jsonl", rows=2, seed=0)
    [found] = find_sources(["org/corpus"], "--data")
    assert isinstance(found, FileSource)
