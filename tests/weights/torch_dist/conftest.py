"""Models to convert, in parts small enough that there are several."""

import pytest
import torch

from megaprune.weights.torch_dist import import_hf
from tests.helpers.converting import with_mtp


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(import_hf, "PART_BYTES", 60_000)


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    """Return a function that gives a model's folder: a family's model, or one with MTP, in several files if that
    matters.
    """
    made = {}

    def get(name):
        if name not in made:
            if name == "mtp":
                made[name] = with_mtp(tiny_model("deepseek_v3"), tmp_path_factory.mktemp("mtp") / "model")
            else:
                dtype = torch.bfloat16 if name in ("llama3", "qwen3_moe") else torch.float32
                made[name] = tiny_model(name, dtype, "200KB")
        return made[name]

    return get
