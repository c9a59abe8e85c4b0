"""Models in other stored layouts than the tables: logits of transformers, and an export in the stored layout."""

import pytest
import torch

from tests.helpers import tiny
from tests.parallel import cases
from tests.parallel.layouts import STORED_LAYOUTS

EVERY = [(name, layout) for name, layouts in STORED_LAYOUTS.items() for layout in ("alone", *layouts)]


@pytest.fixture(params=EVERY, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def computed(request, case, stored_model, tmp_path):
    """Results of one model at one layout."""
    name, layout = case
    if layout == "alone":
        cases.model(stored_model(name), {}, tmp_path / "alone")
        return tmp_path / "alone"
    return request.getfixturevalue("results")(STORED_LAYOUTS[name][layout][0]).path(f"model-{name}-{layout}")


def test_computed_and_exported_as_transformers_has_it(computed, case, stored_model):
    name = case[0]
    model, tokens = stored_model(name), tiny.random_tokens()[:, :-1]
    expected, found = tiny.hf_logits(model, tokens), torch.load(computed / "logits.pt")
    assert expected.std() > 1
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    original, exported = tiny.read_tensors(model), tiny.read_tensors(computed / "hf")
    assert exported.keys() == original.keys()
    for tensor, value in original.items():
        assert exported[tensor].dtype == value.dtype and torch.equal(exported[tensor], value), tensor
    assert len(list((computed / "hf").glob("*.safetensors"))) > 1
    assert torch.equal(tiny.hf_logits(computed / "hf", tokens), expected)


def test_an_untied_output_layer_is_another(stored_model, tiny_model):
    """Ensure that the test above can fail."""
    tokens = tiny.random_tokens()[:, :-1]
    tied, untied = (tiny.hf_logits(folder, tokens) for folder in (tiny_model("qwen3_tied"), _untied(stored_model)))
    assert (tied - untied).abs().mean() > 1


def _untied(stored_model):
    return stored_model("qwen3_tied_untied")
