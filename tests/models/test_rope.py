"""RoPE's settings in every spelling: the inverse frequencies, attention factor and softmax scale of transformers."""

import json
import math

import pytest
import torch
from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_mscale
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from megaprune.mcore.rotary import inverse_frequencies, softmax_scale
from megaprune.models import RopeScaling, family_of
from megaprune.utils.errors import MegapruneError
from tests.helpers.real_configs import (
    DEEPSEEK_R1,
    DEEPSEEK_R1_0528_QWEN3_8B,
    LLAMA_3_1_8B,
    OPENPANGU_ULTRA,
    QWEN2_5_14B,
    QWEN3_30B_A3B,
    QWEN3_32B,
)

MODULES = {
    "llama": LlamaRotaryEmbedding,
    "qwen2": Qwen2RotaryEmbedding,
    "qwen3": Qwen3RotaryEmbedding,
    "qwen3_moe": Qwen3MoeRotaryEmbedding,
    "deepseek_v3": DeepseekV3RotaryEmbedding,
    "kimi_k2": DeepseekV3RotaryEmbedding,
}


def without_rope(config):
    return {key: value for key, value in config.items() if not key.startswith("rope_")}


BASES = {
    config["model_type"]: without_rope(config)
    for config in (LLAMA_3_1_8B, QWEN2_5_14B, QWEN3_32B, QWEN3_30B_A3B, DEEPSEEK_R1)
}
BASES["kimi_k2"] = BASES["deepseek_v3"] | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1}

LENGTH = "original_max_position_embeddings"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, LENGTH: 8192}
NEW = {"rope_theta": 5e5, "rope_type": "default"}
ACCEPTED = {
    "nothing": {},
    "theta": {"rope_theta": 1e6},
    "whole theta": {"rope_theta": 1000000},
    "null scaling": {"rope_theta": 1e6, "rope_scaling": None},
    "empty scaling": {"rope_theta": 1e6, "rope_scaling": {}, "rope_parameters": NEW},
    "new spelling": {"rope_parameters": NEW},
    "new spelling without theta": {"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e6},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "linear, legacy type": {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 3}},
    "both types": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 3.0}},
    "linear beside new spelling": {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_parameters": NEW},
    "linear, new": {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {LENGTH: 8192}},
    "llama3 without length": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "llama3, new": {"rope_parameters": LLAMA3 | {LENGTH: 4096, "rope_theta": 5e5, "factor": 32}},
    "yarn": {"rope_scaling": YARN},
    "yarn, legacy type": {"rope_scaling": {"type": "yarn", "factor": 4.0, LENGTH: 32768}, "rope_theta": 1e6},
    "yarn, new": {"rope_parameters": YARN | {"rope_theta": 1e6}},
    "yarn beside new spelling": {"rope_scaling": YARN, "rope_parameters": NEW},
    "yarn beside new spelling and theta": {"rope_scaling": YARN, "rope_parameters": NEW, "rope_theta": 1e6},
    "two thetas": {"rope_scaling": YARN | {"rope_theta": 5e5}, "rope_theta": 1e6},
    "yarn without length": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "length at the top": {"rope_scaling": YARN, LENGTH: 2048},
    "length at the top alone": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, LENGTH: 2048},
    "length at the top, without scaling": {LENGTH: 2048},
    "null factor": {"rope_scaling": YARN | {"factor": None}},
    "factor below 1": {"rope_scaling": YARN | {"factor": 0.5}},
    "betas": {"rope_scaling": YARN | {"beta_fast": 20, "beta_slow": 2.5}},
    "equal betas": {"rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0}},
    "null and zero betas": {"rope_scaling": YARN | {"beta_fast": None, "beta_slow": 0}},
    "not truncated": {"rope_scaling": YARN | {"truncate": False}},
    "attention factor": {"rope_scaling": YARN | {"attention_factor": 0.7}},
    "null attention factor": {"rope_scaling": YARN | {"attention_factor": None}},
    "mscale": {"rope_scaling": YARN | {"mscale": 0.7}},
    "mscale_all_dim": {"rope_scaling": YARN | {"mscale_all_dim": 0.5}},
    "both mscales": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
    "mscale without effect": {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0}},
    "mscales and attention factor": {
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5, "attention_factor": 1.2}
    },
    # as DeepSeek-R1-0528-Qwen3-8B has it
    "attn_factor": {"rope_scaling": YARN | {"attn_factor": 0.8782488562869419, LENGTH: 32768}, "rope_theta": 1000000},
    "no partial rotation": {"partial_rotary_factor": 1.0, "rope_scaling": YARN | {"partial_rotary_factor": 1}},
}


@pytest.mark.filterwarnings("ignore:attn_factor")
@pytest.mark.parametrize("settings", ACCEPTED.values(), ids=ACCEPTED)
@pytest.mark.parametrize("model_type", MODULES)
def test_as_transformers_computes_it(model_type, settings, tmp_path):
    config = BASES[model_type] | settings
    arch = family_of(config).architecture(config)
    # transformers has no class for kimi_k2, which is DeepSeek's in all but name
    stored = config | {"model_type": model_type.replace("kimi_k2", "deepseek_v3")}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    theirs = AutoConfig.from_pretrained(tmp_path)
    module = MODULES[model_type](theirs)

    dim = arch.transformer["qk_pos_emb_head_dim"] if arch.mla else arch.head_dim
    found = inverse_frequencies(arch.rotary_base, dim, arch.rope_scaling)
    torch.testing.assert_close(found, module.inv_freq, atol=0, rtol=1e-6)
    factor = arch.rope_scaling.attention_factor if arch.rope_scaling else 1.0
    assert math.isclose(factor, module.attention_scaling, rel_tol=1e-12)
    if arch.mla:
        fields = arch.transformer
        mscale = _yarn_get_mscale(fields["rotary_scaling_factor"], fields["mscale_all_dim"])
        assert math.isclose(mscale**2, yarn_apply_mscale(theirs.rope_parameters, 1.0), rel_tol=1e-12)


def test_table_has_different_answers():
    """A reader that ignored the settings would not pass by chance."""
    seen = set()
    for settings in ({}, *(ACCEPTED[name] for name in ("linear", "llama3", "yarn", "betas", "not truncated"))):
        arch = family_of(BASES["llama"]).architecture(BASES["llama"] | settings)
        seen.add(tuple(inverse_frequencies(arch.rotary_base, arch.head_dim, arch.rope_scaling).tolist()))
    assert len(seen) == 6


def test_a_release_with_yarn_and_attn_factor():
    """transformers ignores attn_factor: the factor on cosine and sine follows from the scaling alone."""
    with pytest.warns(UserWarning, match="attn_factor .* is ignored, as transformers ignores it"):
        arch = family_of(DEEPSEEK_R1_0528_QWEN3_8B).architecture(DEEPSEEK_R1_0528_QWEN3_8B)
    assert arch.rotary_base == 1e6
    assert arch.rope_scaling == RopeScaling(
        "yarn",
        4.0,
        original_max_position_embeddings=32768,
        beta_fast=32,
        beta_slow=1,
        truncate=True,
        attention_factor=0.1 * math.log(4.0) + 1,
    )
    assert math.isclose(softmax_scale(arch), 1.1386294361119891**2 / math.sqrt(128), rel_tol=1e-12)


NESTED = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
REFUSED = {
    "per layer type": ({"rope_parameters": NESTED}, "per layer type ('full_attention'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE scaling 'dynamic' is not supported"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "RoPE scaling 'longrope' is not supported"),
    "null type": ({"rope_scaling": {"rope_type": None, "type": "linear"}}, "RoPE scaling None"),
    "list as type": ({"rope_scaling": {"rope_type": ["linear"]}}, "RoPE scaling ['linear']"),
    "linear without factor": ({"rope_scaling": {"type": "linear"}}, "'linear' lacks the key 'factor'"),
    "yarn without factor": ({"rope_scaling": {"type": "yarn", LENGTH: 64}}, "'yarn' lacks the key 'factor'"),
    "llama3 without low": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
        "'llama3' lacks the key 'low_freq_factor'",
    ),
    "low above high": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, "high_freq_factor 4.0 must be greater"),
    "key of another type": ({"rope_scaling": {"type": "linear", "factor": 2.0, LENGTH: 64}}, LENGTH),
    "key without a type": ({"rope_parameters": {"factor": 2.0}}, "'default' with the key 'factor'"),
    "unknown key": ({"rope_scaling": YARN | {"extrapolation_factor": 1.0}}, "'extrapolation_factor'"),
    "mrope": ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, "'mrope_section'"),
    "attn_factor elsewhere": ({"rope_scaling": {"type": "linear", "factor": 2.0, "attn_factor": 1.0}}, "'attn_factor'"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    "partial within": ({"rope_parameters": NEW | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    "other key at the top": ({"rope_ratio": 500}, "'rope_ratio'"),
    "no mapping": ({"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    "list": ({"rope_parameters": [1]}, "rope_parameters [1]"),
    "null theta": ({"rope_theta": None}, "'rope_theta'"),
    "text as theta": ({"rope_theta": "10000"}, "'rope_theta' in config.json is '10000'"),
    "true as theta": ({"rope_parameters": {"rope_theta": True}}, "'rope_theta'"),
    "infinite theta": ({"rope_theta": math.inf}, "'rope_theta'"),
    "text as factor": ({"rope_scaling": YARN | {"factor": "4"}}, "'factor' in config.json is '4'"),
    "negative factor": ({"rope_scaling": YARN | {"factor": -4.0}}, "'factor' in config.json is -4.0"),
    "NaN as factor": ({"rope_scaling": YARN | {"factor": math.nan}}, "'factor' in config.json is nan"),
    "null length": ({"rope_scaling": YARN | {LENGTH: None}}, f"{LENGTH!r} in config.json is None"),
    "null length at the top": ({"rope_scaling": YARN, LENGTH: None}, f"{LENGTH!r} in config.json is None"),
    "text as beta": ({"rope_scaling": YARN | {"beta_fast": "32"}}, "'beta_fast'"),
    "text as truncate": ({"rope_scaling": YARN | {"truncate": "no"}}, "'truncate'"),
    "text as attention factor": ({"rope_scaling": YARN | {"attention_factor": "1"}}, "'attention_factor'"),
    "negative mscale": ({"rope_scaling": YARN | {"mscale": -1}}, "'mscale'"),
}


def refusal(config):
    with pytest.raises(MegapruneError) as caught:
        family_of(config).architecture(config)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(config["model_type"])
    assert "remove the scaling" not in message
    return message


@pytest.mark.parametrize("settings, said", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "deepseek_v3"])
def test_refusals(model_type, settings, said):
    assert said in refusal(BASES[model_type] | settings)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_refusals_of_latent_attention(model_type):
    base = BASES[model_type]
    assert "rope_interleave false" in refusal(base | {"rope_interleave": False})
    assert "'rope_interleave'" in refusal(base | {"rope_interleave": None})
    assert "head_dim 192" in refusal(base | {"head_dim": 192})
    scaling = YARN | {"factor": None, "mscale_all_dim": 1.0}  # fails in transformers too
    assert "'factor' in config.json is None" in refusal(base | {"rope_scaling": scaling})
    assert family_of(base).architecture(base | {"rope_interleave": True, "head_dim": 64}).mla


def test_openpangu_has_theta_in_both_places_and_no_scaling():
    def architecture(config):
        return family_of(config).architecture(config)

    base = without_rope(OPENPANGU_ULTRA)
    assert architecture(OPENPANGU_ULTRA).rotary_base == 25600000
    new = base | {"rope_parameters": {"rope_theta": 16e6, "rope_type": "default"}}
    assert architecture(new).rotary_base == architecture(new).transformer["rotary_base"] == 16e6
    assert "lacks the key 'rope_theta'" in refusal(base)
    assert "RoPE scaling 'yarn'" in refusal(OPENPANGU_ULTRA | {"rope_scaling": YARN})
    assert "RoPE scaling 'linear'" in refusal(OPENPANGU_ULTRA | {"rope_scaling": {"type": "linear", "factor": 2.0}})
