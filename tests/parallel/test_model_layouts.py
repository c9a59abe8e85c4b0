"""Every family at every layout: the logits of transformers, and an export that is bit-identical to the source."""

import json

import pytest
import torch

from megaprune.mcore.builder import EngineOptions, transformer_config
from megaprune.mcore.parallel import ParallelSizes
from megaprune.utils.errors import MegapruneError
from megaprune.weights.source import HFSource
from tests.helpers import pangu, tiny
from tests.parallel import cases
from tests.parallel.layouts import LOAD_LAYOUTS, MOE_FAMILIES, model_layouts


@pytest.fixture(scope="session")
def alone(source, tmp_path_factory):
    """Return a function that gives the results of a family on this process."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp("alone") / family
            cases.model(source(family), {}, made[family])
        return made[family]

    return get


EVERY = [(family, layout) for family in (*tiny.FAMILIES, *MOE_FAMILIES) for layout in ("alone", *model_layouts(family))]


@pytest.fixture(params=EVERY, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def family(case):
    return case[0]


@pytest.fixture
def computed(request, case):
    """Results of one family at one layout."""
    family, layout = case
    if layout == "alone":
        return request.getfixturevalue("alone")(family)
    return request.getfixturevalue("results")(model_layouts(family)[layout][0]).path(f"model-{family}-{layout}")


@pytest.fixture(scope="session")
def expected_logits(source):
    """Return a function that gives the logits of transformers for a family."""
    made = {}

    def get(family):
        if family not in made:
            made[family] = tiny.hf_logits(source(family), tiny.random_tokens()[:, :-1])
        return made[family]

    return get


def test_logits_are_those_of_transformers(computed, family, expected_logits):
    expected = expected_logits(family)
    assert expected.std() > 1
    torch.testing.assert_close(torch.load(computed / "logits.pt"), expected, atol=1e-4, rtol=0)


def test_import_then_export_gives_every_tensor_back(computed, family, source):
    exported, original = tiny.read_tensors(computed / "hf"), tiny.read_tensors(source(family))
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype
        assert torch.equal(exported[name], tensor), name


def test_exported_folder_is_a_model_for_transformers(computed, family, source):
    files = {path.name for path in (computed / "hf").glob("*.safetensors")}
    index = json.loads((computed / "hf" / "model.safetensors.index.json").read_text())
    assert len(files) > 1
    assert set(index["weight_map"].values()) == files
    if family != "pangu_ultra_moe":
        tiny.load_hf(computed / "hf")
        return
    # transformers has no class for it: the export contains the source's code, which no test executes
    assert json.loads((computed / "hf" / "config.json").read_text())["auto_map"] == pangu.CONFIG["auto_map"]
    for name in pangu.REMOTE_CODE:
        assert (computed / "hf" / name).read_text() == (source(family) / name).read_text()


@pytest.mark.parametrize("layout", LOAD_LAYOUTS)
def test_megatron_core_loads_an_imported_checkpoint(results, layout):
    results(2).check(f"load-{layout}")  # the case compares every weight, on each rank


@pytest.mark.parametrize("stages", [[3, 3], [4, 4], [7]])
def test_stages_must_hold_every_layer(source, stages):
    hf = HFSource(source("qwen3"))
    arch = hf.family.architecture(hf.config)
    options = EngineOptions(ParallelSizes(pipeline=len(stages)))
    if sum(stages) == 7:
        assert transformer_config(arch, stages, options).num_layers == 7
    else:
        with pytest.raises(MegapruneError, match=rf"{sum(stages)} layers, not 7"):
            transformer_config(arch, stages, options)
