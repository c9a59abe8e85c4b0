"""Configs of released models, in Megatron-Core's terms, and the parameters that their tables add up to."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megaprune.models import FAMILIES, RopeScaling, family_of
from megaprune.models.shapes import hf_shapes
from tests.helpers.hf_tensors import expected_tensors
from tests.helpers.newer_configs import NEWER_DENSE
from tests.helpers.newer_moe_configs import NEWER_MOE
from tests.helpers.real_configs import DENSE, LLAMA_3_1_8B, LLAMA_3_8B, MOE, QWEN2_5_0_5B

# What the makers, or sums over the released files, say; without multi-token prediction.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3.1-8b": 8_030_261_248,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-0.5b": 494_032_768,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-r1": 671_026_419_200,
    "mistral-7b": 7_241_732_096,
    "mistral-small-24b": 23_572_403_200,
    "ministral-8b": 8_019_808_256,
    "ministral-3-14b": 13_506_073_600,
    "phi-4": 14_659_507_200,
    "smollm3-3b": 3_075_098_624,
    "olmo-2-7b": 7_298_617_344,
    "olmo-3-32b": 32_233_522_176,
    "gemma-3-1b": 999_885_952,
    "openpangu-embedded-7b": 8_030_887_936,
    "glm-4.5": 352_797_829_024,
    "glm-4.5-air": 106_852_251_264,
    "glm-4.7-flash": 29_943_393_920,
    "minimax-m2": 228_689_764_864,
    "deepseek-v3.2": 671_877_944_064,
    "kimi-k2-thinking": 1_026_408_232_448,
    "mixtral-8x7b": 46_702_792_704,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}
NEWER = NEWER_DENSE | NEWER_MOE
# num_layers, hidden_size, ffn_hidden_size, num_attention_heads, num_query_groups, kv_channels, layernorm_epsilon
SIZES = {
    "llama-2-7b": (32, 4096, 11008, 32, 32, 128, 1e-5),
    "llama-3-8b": (32, 4096, 14336, 32, 8, 128, 1e-5),
    "llama-3.1-8b": (32, 4096, 14336, 32, 8, 128, 1e-5),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 128, 1e-6),
    "qwen2.5-0.5b": (24, 896, 4864, 14, 2, 64, 1e-6),
    "qwen3-32b": (64, 5120, 25600, 64, 8, 128, 1e-6),
}
SIZE_FIELDS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")


def architecture(config):
    return family_of(config).architecture(config)


def exported_names(config):
    return [name for rule in family_of(config).rules(config) if rule.export for name in rule.hf]


@pytest.mark.parametrize("name", DENSE)
def test_dense_architectures(name):
    config = DENSE[name]
    arch = architecture(config)
    expected = dict(zip((*SIZE_FIELDS, "layernorm_epsilon"), SIZES[name], strict=True))
    extra = {"qwen2": {"add_qkv_bias": True}, "qwen3": {"qk_layernorm": True}}.get(config["model_type"], {})
    assert arch.transformer == expected | extra
    assert arch.vocab_size == config["vocab_size"]
    assert arch.max_position_embeddings == config["max_position_embeddings"]
    assert arch.rotary_base == config.get("rope_theta", 10000.0)
    assert arch.tied == (name == "qwen2.5-0.5b")
    assert (arch.rope_scaling is not None) == (name == "llama-3.1-8b")
    assert not (arch.mla or arch.num_experts)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    config = (DENSE | MOE | NEWER)[name]
    names = exported_names(config)
    assert len(names) == len(set(names))
    assert sum(map(math.prod, hf_shapes(names, architecture(config)).values())) == PARAMETERS[name]


@pytest.mark.parametrize("name", NEWER)
def test_each_tensor_is_covered_once_before_and_after_pruning(name):
    config = NEWER[name]
    family, num_layers = family_of(config), config["num_hidden_layers"]
    for kept in (range(num_layers), [*range(2, num_layers // 2), num_layers - 1]):
        pruned = family.prune_config(config, kept)
        names = exported_names(pruned)
        assert len(names) == len(set(names))
        assert hf_shapes(names, architecture(pruned)) == expected_tensors(pruned, mtp=False)
        if kept != range(num_layers):
            assert architecture(pruned) == architecture(config).pruned(kept)


def test_parameters_of_openpangu():
    config = MOE["openpangu-ultra"]
    total = sum(map(math.prod, hf_shapes(exported_names(config), architecture(config)).values()))
    assert round(total / 1e9, 1) == 719.1  # no exact figure is public


@pytest.mark.parametrize("name", [*DENSE, *(name for name in NEWER_DENSE if "pangu" not in name)])
def test_names_and_shapes_are_those_of_transformers(name):
    config = dict((DENSE | NEWER_DENSE)[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if architecture(config).tied:
        stored.pop("lm_head.weight")
    assert hf_shapes(exported_names(config), architecture(config)) == stored


def test_families_are_listed_under_their_own_name():
    assert all(family.model_type == model_type for model_type, family in FAMILIES.items())


# RoPE


def test_both_spellings_of_rope():
    old = architecture(LLAMA_3_1_8B)
    assert old.rotary_base == 500000.0
    assert old.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    new = {key: value for key, value in LLAMA_3_1_8B.items() if not key.startswith("rope_")}
    new["rope_parameters"] = LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert architecture(new) == old


def test_rope_without_scaling_in_both_spellings():
    new = {key: value for key, value in LLAMA_3_8B.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    assert architecture(new) == architecture(LLAMA_3_8B)
    assert architecture({**new, "rope_parameters": None}).rotary_base == 10000.0


def test_linear_scaling():
    for scaling in ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}):
        assert architecture(LLAMA_3_8B | {"rope_scaling": scaling}).rope_scaling == RopeScaling("linear", 4.0)


def test_other_numbers_of_llama3_scaling_are_kept():
    scaling = LLAMA_3_1_8B["rope_scaling"] | {"factor": 32.0, "high_freq_factor": 2.0}  # LLaMA 3.2 has the first
    assert architecture(LLAMA_3_8B | {"rope_scaling": scaling}).rope_scaling == RopeScaling(
        "llama3", 32.0, 1.0, 2.0, 8192
    )


# The shape of the tables


@pytest.mark.parametrize("name", DENSE | MOE)
def test_rules_name_each_tensor_and_parameter_once(name):
    rules = family_of((DENSE | MOE)[name]).rules((DENSE | MOE)[name])
    for names in ([rule.megatron for rule in rules], [rule.te or rule.megatron for rule in rules]):
        assert len(names) == len(set(names))


def test_tied_output_reads_the_embedding_and_is_not_exported():
    rules = {rule.megatron: rule for rule in family_of(QWEN2_5_0_5B).rules(QWEN2_5_0_5B)}
    output, embedding = rules["output_layer.weight"], rules["embedding.word_embeddings.weight"]
    assert output.hf == embedding.hf == ("model.embed_tokens.weight",)
    assert embedding.export and not output.export
    assert "lm_head.weight" not in exported_names(QWEN2_5_0_5B)
