"""Every accepted form of RoPE, on one process and on two: the logits of transformers, in fp32 and bf16.

Also every form of openPangu's layers, against its reference.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from megaprune.cli import main as cli
from megaprune.weights.source import HFSource
from megaprune.weights.surgery import write_pruned_config, write_pruned_weights
from tests.helpers import pangu, tiny
from tests.helpers.launch import launch_cases
from tests.parallel import rope_cases
from tests.parallel.rope_cases import FORMS, PANGU

pytestmark = pytest.mark.filterwarnings("ignore:attn_factor")


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rope")
    made = {
        name: rope_cases.make_model(folder / name, tiny_model(family, torch.bfloat16), settings)
        for name, (family, settings, _) in FORMS.items()
    }
    return made | {name: pangu.make_checkpoint(folder / name, config=config) for name, (config, _) in PANGU.items()}


@pytest.fixture(scope="module")
def computed(models, tmp_path_factory):
    """Return a function that gives the folder of a form's logits, on one process or at the form's layout of two."""
    folder = tmp_path_factory.mktemp("rope_logits")
    for name, model in models.items():
        rope_cases.logits(model, {}, folder / f"{name}-alone")
    cases = {
        f"{name}-two": dict(kind="rope_cases.logits", hf_model=models[name], sizes=sizes, out=folder / f"{name}-two")
        for name, (*_, sizes) in (FORMS | PANGU).items()
    }
    launched = launch_cases(2, cases, folder)
    return lambda name, layout: launched.path(f"{name}-two") if layout == "two" else folder / f"{name}-{layout}"


@pytest.fixture(scope="module")
def expected(models):
    """Return a function that gives the logits of transformers for a form, in fp32 or bf16."""
    made = {}

    def get(name, dtype):
        if (name, dtype) not in made:
            model = AutoModelForCausalLM.from_pretrained(models[name], dtype=dtype, attn_implementation="eager")
            with torch.no_grad():
                made[name, dtype] = model.eval()(tiny.random_tokens()[:, :-1]).logits.float()
        return made[name, dtype]

    return get


@pytest.mark.parametrize("layout", ["alone", "two"])
@pytest.mark.parametrize("name", FORMS)
def test_fp32_logits(name, layout, computed, expected):
    reference = expected(name, torch.float32)
    assert reference.std() > 1
    torch.testing.assert_close(torch.load(computed(name, layout) / "fp32.pt"), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["alone", "two"])
@pytest.mark.parametrize("name", FORMS)
def test_bf16_logits(name, layout, computed, expected):
    """Compare the distance of bf16 from fp32 with that of transformers, in the median, because a token whose experts
    are nearly tied may be routed differently in one of the two.
    """
    reference = expected(name, torch.float32)
    ours = (torch.load(computed(name, layout) / "bf16.pt") - reference).abs().median()
    theirs = (expected(name, torch.bfloat16) - reference).abs().median()
    assert 0 < ours < 1.15 * theirs


@pytest.mark.parametrize("layout", ["alone", "two"])
@pytest.mark.parametrize("name", PANGU)
def test_openpangu(name, layout, computed, models):
    reference = tiny.hf_logits(models[name], tiny.random_tokens()[:, :-1])
    torch.testing.assert_close(torch.load(computed(name, layout) / "fp32.pt"), reference, atol=1e-4, rtol=0)


def test_the_expert_bias_of_openpangu_is_carried(models, tmp_path):
    """Pruning renames the bias, and conversion to a Megatron-Core checkpoint and back keeps it."""
    name, source = "model.layers.{}.mlp.e_score_correction_bias", HFSource(models["pangu_expert_bias"])
    original = tiny.read_tensors(source.folder)
    (tmp_path / "pruned").mkdir()
    write_pruned_weights(source, [1, 3, 4], tmp_path / "pruned", 10**9)
    assert torch.equal(tiny.read_tensors(tmp_path / "pruned")[name.format(1)], original[name.format(3)])
    megatron, back = str(tmp_path / "megatron"), str(tmp_path / "back")
    assert cli.attempt("convert", ["import", "--hf-model", str(source.folder), "--megatron-path", megatron]) == (
        0,
        None,
    )
    assert cli.attempt("convert", ["export", "--megatron-path", megatron, "--hf-path", back]) == (0, None)
    exported = tiny.read_tensors(tmp_path / "back")
    assert exported.keys() == original.keys()
    assert all(torch.equal(tensor, exported[key]) for key, tensor in original.items())


@pytest.mark.parametrize("name", [name for name, (_, settings, _) in FORMS.items() if "type" in str(settings)])
def test_the_form_matters(name, models, expected, tmp_path):
    """Ensure that the tests above can fail: the logits of plain RoPE differ clearly from those of every scaled form."""
    plain = rope_cases.make_model(tmp_path / "plain", models[name], {})
    difference = tiny.load_hf(plain)(tiny.random_tokens()[:, :-1]).logits - expected(name, torch.float32)
    assert difference.abs().max() > 0.1


def test_export_keeps_the_spelling(models, tmp_path):
    for name, (_, settings, _) in FORMS.items():
        source, folder = HFSource(models[name]), tmp_path / name
        folder.mkdir()
        write_pruned_config(source, range(1, 4), folder)
        written = json.loads((folder / "config.json").read_text())
        about_rope = {key: value for key, value in written.items() if key.startswith("rope_")}
        assert about_rope == {key: value for key, value in settings.items() if key.startswith("rope_")}, name
