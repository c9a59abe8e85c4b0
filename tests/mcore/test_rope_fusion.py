"""Fused RoPE is asked for only where Megatron-Core accepts it; checked on the configuration, without the kernels."""

import dataclasses

import pytest

from megaprune.mcore.builder import EngineOptions, transformer_config
from megaprune.mcore.parallel import ParallelSizes
from megaprune.models import family_of
from tests.helpers.real_configs import DENSE, MOE

FUSED = EngineOptions(ParallelSizes(), transformer_engine=True)


def mla_architectures():
    found = {name: family_of(config).architecture(config) for name, config in (DENSE | MOE).items()}
    return {name: arch for name, arch in found.items() if arch.mla}


@pytest.mark.parametrize(("name", "arch"), mla_architectures().items())
def test_latent_attention_fuses_yarn_alone(name, arch):
    for rope_type in ("rope", "yarn"):
        given = dataclasses.replace(arch, transformer=arch.transformer | {"rope_type": rope_type})
        config = transformer_config(given, [arch.num_layers], FUSED)  # the core's own checks run here
        assert config.apply_rope_fusion == (rope_type == "yarn"), name
