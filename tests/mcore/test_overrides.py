"""Fields of Megatron-Core's configurations that the user sets."""

import pytest
from megatron.core.transformer.enums import AttnBackend

from megaprune.cli.prune import parse_config
from megaprune.config.schema import Config
from megaprune.mcore.builder import EngineOptions, transformer_config
from megaprune.mcore.optimizer import OptimizerOptions, check_training_configs
from megaprune.mcore.overrides import Overrides, read_overrides
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models import family_of
from megaprune.pruning.resolve import fixed_settings, resolve
from megaprune.utils.errors import UsageError
from tests.helpers import real_configs

BASE = {"hf_model": "m", "save": "s", "train_data": ["d"], "train_iters": 10, "num_layers_to_prune": 4}


def test_values_have_the_types_of_their_fields():
    found = read_overrides(
        [
            "transformer.moe_permute_fusion=true",
            "transformer.attention_backend=flash",
            "transformer.fp8=hybrid",
            "transformer.offload_modules=[core_attn, moe_act]",
            "transformer.fp8_margin=2",
            "ddp.bucket_size=null",
            "optimizer.adam_eps=1e-9",
            "optimizer.adam_beta2=1",
            "optimizer.adam_beta2=0.98",
        ],
        mla=False,
    )
    assert found == Overrides(
        {
            "moe_permute_fusion": True,
            "attention_backend": AttnBackend.flash,
            "fp8": "hybrid",
            "offload_modules": ["core_attn", "moe_act"],
            "fp8_margin": 2,
        },
        {"bucket_size": None},
        {"adam_eps": 1e-9, "adam_beta2": 0.98},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("moe_permute_fusion=true", "'moe_permute_fusion=true' is not of the form SECTION.FIELD=VALUE"),
        ("model.hidden_size=3", "one of the sections transformer, ddp, optimizer"),
        ("transformer.moe_permute_fusion", "is not of the form"),
        ("transformer.moe_permut_fusion=true", "TransformerConfig has no such field"),
        ("ddp.adam_beta1=0.9", "DistributedDataParallelConfig has no such field"),
        ("transformer._cpu_offloading_context=1", "has no such field"),
        ("transformer.tensor_model_parallel_size=2", "give --tensor-model-parallel-size instead"),
        ("optimizer.lr=1", "give --lr instead"),
        ("transformer.hidden_size=3", "follows from the model and can't be set"),
        ("transformer.kv_lora_rank=3", "follows from the model"),
        ("transformer.moe_aux_loss_coeff=0.1", "is set by the run and can't be changed"),
        ("ddp.overlap_param_gather=true", "is set by the run"),
        ("transformer.timers=1", "timers=1 is not"),
        ("transformer.moe_permute_fusion=2", "moe_permute_fusion=2 is not true, false"),
        ("transformer.fp8=int8", "fp8=int8 is not e4m3 or hybrid or null"),
        ("ddp.bucket_size=big", "bucket_size=big is not an integer or null"),
        ("optimizer.adam_eps=small", "adam_eps=small is not a number"),
        ("optimizer.adam_eps=true", "adam_eps=true is not a number"),
    ],
)
def test_what_is_no_field_or_not_the_users_is_refused(text, message):
    with pytest.raises(UsageError) as caught:
        read_overrides([text], mla=True)
    assert message in str(caught.value) and str(caught.value).startswith("--override ")


def test_the_cores_own_configurations_get_the_values():
    arch = family_of(real_configs.DEEPSEEK_R1).architecture(real_configs.DEEPSEEK_R1)
    chosen = ["transformer.disable_bf16_reduced_precision_matmul=true", "transformer.moe_router_dtype=fp64"]
    engine = EngineOptions(ParallelSizes(), overrides=read_overrides(chosen, mla=True))
    config = transformer_config(arch, [61], engine)
    assert config.disable_bf16_reduced_precision_matmul and config.moe_router_dtype == "fp64"
    plain = transformer_config(arch, [61], EngineOptions(ParallelSizes()))
    assert not plain.disable_bf16_reduced_precision_matmul and plain.moe_router_dtype == "fp32"


def test_sections_of_a_recipe_are_overrides_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("transformer:\n  fp8_margin: 1\n  fp8_interval: 7\nddp: {bucket_size: 1000}\n")
    words = [
        "--hf-model",
        "m",
        "--save",
        "s",
        "--train-data",
        "d",
        "--train-iters",
        "9",
        "--num-layers-to-prune",
        "4",
        "--config",
    ]
    config = parse_config([*words, str(recipe), "--override", "transformer.fp8_margin=3"])
    found = read_overrides(config.engine.override, mla=False)
    assert found.transformer == {"fp8_margin": 3, "fp8_interval": 7} and found.ddp == {"bucket_size": 1000}
    same = Config.from_mapping(BASE | {"optimizer": {"adam_eps": 1e-9}, "override": ["ddp.bucket_size=5"]})
    assert same.engine.override == ["optimizer.adam_eps=1e-09", "ddp.bucket_size=5"]
    assert fixed_settings(same)["override"] == same.engine.override  # a resumed run must have the same


@pytest.mark.parametrize("section", ["transformer", {"a": {"b": 1}}])
def test_a_section_maps_fields_to_values(section):
    with pytest.raises(UsageError, match=r"ddp must map fields to values|ddp.a must be a value"):
        Config.from_mapping(BASE | {"ddp": section})


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        (real_configs.QWEN3_32B, {"moe_token_dispatcher_type": "allgather"}, "is for models with experts"),
        (real_configs.DEEPSEEK_R1, {"moe_token_dispatcher_type": "flex"}, "needs the package deep_ep"),
        (real_configs.QWEN3_32B, {"override": ["transformer.no_such=1"]}, "no such field"),
        (
            real_configs.QWEN3_32B,
            {"override": ["transformer.fp8=hybrid"]},
            "--override transformer.fp8 needs Transformer Engine",
        ),
        (
            real_configs.DEEPSEEK_R1,
            {"override": ["transformer.moe_permute_fusion=true"]},
            "Megatron-Core refuses the options of --override",
        ),
        (
            real_configs.QWEN3_32B,
            {"recompute_granularity": "selective", "recompute_modules": ["nothing"]},
            "Megatron-Core refuses the options",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_run(model, flags, message):
    config = Config.from_mapping(BASE | {"seq_length": 128, "lora_rank": 2} | flags)
    with pytest.raises(UsageError) as caught:
        resolve(config, model, 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_optimizers_configuration_is_checked_before_the_run():
    options = OptimizerOptions(1e-3, 0.0, "cosine", 0, 9, 0.01, 1.0)
    engine = EngineOptions(
        ParallelSizes(), overrides=read_overrides(["optimizer.use_precision_aware_optimizer=true"], mla=False)
    )
    with pytest.raises(UsageError, match="Megatron-Core refuses the options of --override"):
        check_training_configs(engine, options)
    check_training_configs(EngineOptions(ParallelSizes()), options)


def test_recomputed_modules_need_their_granularity():
    with pytest.raises(UsageError, match="--recompute-modules needs --recompute-granularity selective"):
        Config.from_mapping(BASE | {"recompute_modules": ["mlp"]})
