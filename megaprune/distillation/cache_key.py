"""The key of a teacher cache: all inputs of its targets."""

from typing import Any

from megaprune.data.datasets import Windows
from megaprune.data.tokenizer import tokenizer_fingerprint
from megaprune.distillation.cache_format import CacheKey
from megaprune.mcore import parallel
from megaprune.utils.errors import MegapruneError
from megaprune.weights.fingerprint import fingerprinted_tensors, model_fingerprint, tensor_digests
from megaprune.weights.tensor_source import TensorSource


def fingerprint_of(source: TensorSource) -> str:
    """Return the model's fingerprint; each rank reads its share of the tensors. Collective."""
    names = fingerprinted_tensors(source)
    error: MegapruneError | None = None
    digests: dict[str, Any] = {}
    share = -(-len(names) // parallel.world_size())  # consecutive names: they may be in one fused tensor
    try:
        digests = tensor_digests(source, names[parallel.rank() * share :][:share])
    except MegapruneError as met:
        error = met
    parallel.raise_together(error)
    parts = parallel.all_gather_objects(digests)
    return model_fingerprint(source, {name: digest for part in parts for name, digest in part.items()})


def cache_key(source: TensorSource, tokenizer: Any, data: Windows) -> CacheKey:
    """Return the key of a teacher's targets on these data. Collective."""
    return CacheKey(
        model=fingerprint_of(source),
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=data.fingerprint,
        seq_length=data.seq_length,
        windows=len(data),
        vocab_size=source.family.architecture(source.config).vocab_size,
    )
