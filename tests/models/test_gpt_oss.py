"""GPT-OSS's stored stacks: the released names, in MXFP4, and those of transformers' class."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megaprune.models import family_of
from megaprune.models.shapes import hf_shapes
from megaprune.weights.quantized import MXFP4, declared_format
from megaprune.weights.stored_layout import StoredLayout
from megaprune.weights.writer import stacked_shape
from tests.helpers.newer_moe_configs import GPT_OSS_20B, GPT_OSS_120B
from tests.models.test_real_configs import PARAMETERS, exported_names

CONFIGS = {"gpt-oss-20b": GPT_OSS_20B, "gpt-oss-120b": GPT_OSS_120B}
_STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def stored(name):
    """Names and shapes of transformers' class."""
    plain = {key: value for key, value in CONFIGS[name].items() if key != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_names_and_shapes_are_those_of_transformers(name, stored):
    config, layout = CONFIGS[name], StoredLayout.of(stored, tied=False, whole_experts=True)
    shapes = hf_shapes(exported_names(config), family_of(config).architecture(config))
    found = {}
    for held, parts in layout.groups(shapes).items():
        of_parts = [(shapes[part], "BF16") for part in parts]
        stack = layout.stack_of(parts[0])
        found[held] = stacked_shape(held, of_parts, layout.parts_of_expert(stack))[0] if stack else of_parts[0][0]
    assert {held: tuple(shape) for held, shape in found.items()} == stored
    assert sum(map(math.prod, stored.values())) == PARAMETERS[name]


def test_released_names_cover_each_weight_once(name, stored):
    config, format = CONFIGS[name], declared_format(CONFIGS[name])
    assert isinstance(format, MXFP4)
    released = {}
    for held, shape in stored.items():
        if held.endswith(_STACKS):
            experts, inner, outer = shape
            released |= {
                f"{held}_blocks": (experts, outer, inner // 32, 16),
                f"{held}_scales": (experts, outer, inner // 32),
            }
        else:
            released[held] = shape
    layout = StoredLayout.of(released, tied=False, whole_experts=True)
    names, expected = [], hf_shapes(exported_names(config), family_of(config).architecture(config))
    for held, shape in released.items():
        for part in layout.places(held, shape[0]):
            weight = part.removesuffix("_blocks").removesuffix("_scales")
            of_part = shape[1:] if ".experts." in held else shape
            if part.endswith("_scales"):
                assert of_part == format.companion_shape("_scales", expected[weight])
                continue
            names.append(weight)
            assert (format.shape(of_part) if part.endswith("_blocks") else of_part) == expected[weight]
    assert len(names) == len(set(names)) and set(names) == expected.keys()


def test_settings_of_the_released_models(name):
    arch = family_of(CONFIGS[name]).architecture(CONFIGS[name])
    without = {key: value for key, value in CONFIGS[name].items() if key not in ("rope_scaling", "rope_theta")}
    assert family_of(without).architecture(without) == arch  # transformers' defaults
    assert arch.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(32) + 1) and arch.rotary_base == 150000
    fields = arch.transformer
    assert fields["window_size"] == (127, 0) and fields["window_attn_skip_freq"][:2] == [1, 0]
    assert (fields["activation_func_clamp_value"], arch.sigmoid_factor) == (7.0, 1.702)
