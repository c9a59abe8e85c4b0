"""A rank that can't write during an export ends it on every rank, though only some ranks write."""

import pytest

from tests.helpers.launch import launch_cases

EXPORTS = {"weights": False, "adapter": True}


@pytest.fixture(scope="module")
def launched(tiny_model, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("exports"), tiny_model("qwen3_tied")
    cases = {
        name: dict(kind="export_cases.full_disk_at_export", hf_model=model, adapter=adapter, out=folder / name)
        for name, adapter in EXPORTS.items()
    }
    return launch_cases(2, cases, folder)


@pytest.mark.parametrize("export", EXPORTS)
def test_every_rank_ends_with_the_writers_error(launched, export):
    folder = launched.path(export)
    first, second = ((folder / f"error.{rank}").read_text() for rank in range(2))
    assert first == second
    assert first.startswith(f"{folder} can't be written (File too large, where ")
    assert list(folder.glob("*.json")) == []  # neither an index nor the adapter's configuration
