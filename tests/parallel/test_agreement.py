"""Rank 0 decides what a run finds in the file system, and the others wait for its work without a limit."""

import pickle
import shutil

import numpy as np
import pytest

import megaprune
from megaprune.data.prepare import prepare_dataset
from megaprune.data.tokenizer import tokenizer_in
from megaprune.utils.errors import MegapruneError
from tests.helpers import tiny
from tests.helpers.launch import launch


def test_rank_0_decides_for_all(tiny_model, tiny_data, tmp_path):
    model = str(tiny_model("qwen3_tied"))
    cut = dict(hf_model=model, method="manual", prune_layers="2,3", train_iters=0)
    views = [tmp_path / "seen", tmp_path / "stale"]
    for view in views:
        view.mkdir()
    megaprune.prune(**cut, save=views[0] / "run")
    trained = dict(
        hf_model=model,
        method="manual",
        prune_layers="2,3",
        train_iters=3,
        train_data=[str(tiny_data / "train.jsonl")],
        seq_length=tiny.SEQ_LENGTH,
        distill_loss="ce",
    )
    nodes = {"one": ["0", "0"], "two": ["0", "1"]}
    for name in nodes:
        (tmp_path / name).mkdir()
    cases = [
        *(dict(kind="agreement_cases.once_a_node", out=tmp_path / name, nodes=of) for name, of in nodes.items()),
        dict(kind="agreement_cases.finished_elsewhere", views=views, flags=cut),
        dict(kind="agreement_cases.stale_checkpoints", flags=trained, save=tmp_path / "run"),
        dict(kind="agreement_cases.long_work"),
        dict(kind="agreement_cases.signaled_elsewhere"),
    ]
    launch(2, cases, tmp_path)
    assert {name: len(list((tmp_path / name).iterdir())) for name in nodes} == {"one": 1, "two": 2}
    assert not list(views[1].iterdir()), "rank 1 began a run of its own"


def test_other_ranks_map_the_files_of_rank_0_or_say_that_they_are_missing(tiny_model, tiny_data, tmp_path):
    tokenizer = tokenizer_in(tiny_model("qwen3_tied"), False)
    dataset = prepare_dataset(
        [str(tiny_data / "train.jsonl")], tokenizer, seq_length=tiny.SEQ_LENGTH, cache_dir=tmp_path / "cache"
    )
    sent = pickle.dumps(dataset)
    assert len(sent) < 2000, "the tokens are not sent"
    received = pickle.loads(sent)
    assert np.array_equal(received.stream.tokens, dataset.stream.tokens)
    assert received.fingerprint == dataset.fingerprint
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(MegapruneError, match="--data-cache-path"):
        pickle.loads(sent)
