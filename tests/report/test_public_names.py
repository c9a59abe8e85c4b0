"""Local paths in published files: only their last parts appear."""

import pytest

from megaprune.report.public_names import is_hub_id, public_name, without_paths


@pytest.mark.parametrize(
    "command, shown",
    [
        ("prune.py --config demo.yaml --lr 1e-4", "prune.py --config demo.yaml --lr 1e-4"),
        ("prune.py --hf-model Qwen/Qwen3-8B --save /home/me/runs/x", "prune.py --hf-model Qwen/Qwen3-8B --save x"),
        ("tools/prune.py --hf-model=/home/me/model/", "tools/prune.py --hf-model=model"),
        ("prune.py --train-data 0.3 ~/a/b.jsonl 0.7 ../../c/d", "prune.py --train-data 0.3 b.jsonl 0.7 d"),
        ("prune.py --train-data '/home/my name/the data.jsonl'", "prune.py --train-data 'the data.jsonl'"),
        ("prune.py --train-data client/secret/x.parquet", "prune.py --train-data x.parquet"),
        ("prune.py --override transformer.a=/home/me/b", "prune.py --override transformer.a=b"),
        (
            "prune.py --save file:///home/me/b --train-data s3://bucket/x",
            "prune.py --save b --train-data s3://bucket/x",
        ),
        (r"prune.py --save 'C:\Users\me\run'", "prune.py --save run"),
        (
            "megaprune.prune(hf_model='/home/me/m', train_data=['a/b/c.jsonl', 'o/n'], lr=0.1, save=PosixPath('/h/x'))",
            "megaprune.prune(hf_model='m', train_data=['c.jsonl', 'o/n'], lr=0.1, save=PosixPath('x'))",
        ),
        ("prune.py --text 'unclosed /home/me/x", "prune.py --text 'unclosed x"),
        ("", ""),
    ],
)
def test_commands_keep_everything_but_folders(command, shown):
    assert without_paths(command) == shown


def test_a_folder_with_a_hub_ids_form_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("runs/x") and without_paths("prune.py --save runs/x") == "prune.py --save runs/x"
    (tmp_path / "runs" / "x").mkdir(parents=True)
    assert not is_hub_id("runs/x") and without_paths("prune.py --save runs/x") == "prune.py --save x"


def test_a_folder_of_the_hubs_cache_is_its_model():
    cached = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0123abcd"
    assert public_name(cached) == "Qwen/Qwen3-8B"
    assert without_paths(f"prune.py --hf-model {cached}/") == "prune.py --hf-model Qwen/Qwen3-8B"
