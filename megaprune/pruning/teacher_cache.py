"""The cache that fits a run: which data can have one, and what it must have been made from."""

from pathlib import Path
from typing import Any

from megaprune.config.schema import Config
from megaprune.data.blend import find_blend
from megaprune.data.datasets import Windows
from megaprune.data.tokenizer import tokenizer_fingerprint
from megaprune.distillation.cache_format import CacheKey
from megaprune.distillation.cache_reader import TeacherCache
from megaprune.mcore import parallel
from megaprune.utils.errors import MegapruneError, UsageError
from megaprune.weights.fingerprint import fingerprinted_tensors, model_fingerprint, tensor_digests
from megaprune.weights.source import HFSource


def check_cacheable(config: Config) -> None:
    """Refuses training data whose windows are not the same at every seed and length of a run.

    Raises:
        UsageError: they are a blend that Megatron draws.
    """
    blend = find_blend(config.data.train_data, "--train-data")
    if blend is not None and blend.weights is not None:
        raise UsageError(
            f"--train-data {' '.join(config.data.train_data)}: a cached teacher goes with windows as they lie in the "
            "files, where a blend's follow from the seed; leave the weights out, or use --teacher online"
        )


def open_cache(config: Config, source: HFSource, tokenizer: Any, train: Windows) -> TeacherCache:
    """What the teacher said of the training windows. Collective.

    Raises:
        MegapruneError: it was made from something else, or is damaged; on every rank.
    """
    distillation = config.distillation
    wanted = cache_key(source, tokenizer, train)

    def load() -> TeacherCache:
        return TeacherCache(Path(distillation.teacher_logits), wanted, distillation.distill_top_k)

    def check() -> TeacherCache:
        cache = load()
        cache.check_shards()
        return cache

    return parallel.on_first_rank(check) or load()


def fingerprint_of(source: HFSource) -> str:
    """The model's fingerprint; each rank reads its share of the tensors. Collective."""
    names, error, digests = fingerprinted_tensors(source), None, {}
    share = -(-len(names) // parallel.world_size())  # neighbours together: they may lie in one fused tensor
    try:
        digests = tensor_digests(source, names[parallel.rank() * share :][:share])
    except MegapruneError as met:
        error = met
    parallel.raise_together(error)
    parts = parallel.from_all_ranks(digests)
    return model_fingerprint(source, {name: digest for part in parts for name, digest in part.items()})


def cache_key(source: HFSource, tokenizer: Any, data: Windows) -> CacheKey:
    """What a teacher's targets on these data follow from. Collective."""
    return CacheKey(
        model=fingerprint_of(source),
        tokenizer=tokenizer_fingerprint(tokenizer),
        data=data.fingerprint,
        seq_length=data.seq_length,
        windows=len(data),
        vocab_size=source.family.architecture(source.config).vocab_size,
    )
