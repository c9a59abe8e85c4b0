"""Megatron-Core's indexed datasets: its writer, and the blends that it draws training samples from."""

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megaprune.mcore import parallel
from megaprune.utils.errors import MegapruneError


def token_dtype(vocab_size: int) -> np.dtype:
    """What Megatron stores the tokens of a vocabulary as."""
    return np.dtype(DType.optimal_dtype(vocab_size))


def new_builder(bin_path: Path, dtype: np.dtype) -> IndexedDatasetBuilder:
    """Megatron's writer of a dataset."""
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype.type)
    # As lists they would take ten times the memory, which is all that grows with the number of documents.
    builder.sequence_lengths, builder.document_indices = array("i"), array("q", [0])
    return builder


class _Vocabulary:
    """What a GPTDataset asks of its tokenizer."""

    def __init__(self, vocab_size: int, eod: int) -> None:
        self.vocab_size, self.eod = vocab_size, eod
        self.unique_identifiers = OrderedDict(vocab_size=vocab_size, eod=eod)


def blend_datasets(
    prefixes: Sequence[str],
    weights: Sequence[float],
    *,
    num_samples: int,
    seq_length: int,
    seed: int,
    vocab_size: int,
    eod: int,
    index_folder: Path,
    build: bool,
) -> Any:
    """At least `num_samples` samples of the datasets, blended and shuffled by Megatron: a GPTDataset, or a
    BlendedDataset of several. Collective.

    Args:
        prefixes: absolute ones: they are in the names of the indices.
        index_folder: of the index files, which are mapped.
        build: rank 0 writes the index files, the others get None; else all ranks map what is there.

    Raises:
        MegapruneError: the compiled helpers of megatron-core are missing.
    """
    try:
        # The core imports it where it first needs it. Its own remedy, compile_helpers, needs a Makefile that no
        # wheel has.
        from megatron.core.datasets import helpers  # noqa: F401
    except ImportError as error:
        raise MegapruneError(
            f"megatron-core came without its compiled dataset helpers ({error}): install a wheel built for this "
            "platform (pip install --force-reinstall megatron-core, which compiles them where there is a C++ compiler)"
        ) from None
    share = _shares(weights)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[(list(prefixes), share.tolist()), None, None],
        path_to_cache=str(index_folder),
        tokenizer=_Vocabulary(vocab_size, eod),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=_surplus(share, num_samples),
    )
    built_here = (lambda: parallel.rank() == 0) if build else (lambda: True)
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, None, None], built_here, config).build()[0]


def samples_indexed(weights: Sequence[float], num_samples: int) -> np.ndarray:
    """How many samples of each dataset a blend of `num_samples` has at hand, [datasets]."""
    share = _shares(weights)
    if len(share) == 1:
        return np.array([num_samples])
    return np.ceil(np.ceil(num_samples * share) * (1 + _surplus(share, num_samples)))


def _shares(weights: Sequence[float]) -> np.ndarray:
    return np.asarray(weights, np.float64) / np.sum(weights)


def _surplus(share: np.ndarray, num_samples: int) -> float:
    """Samples beyond each dataset's share, as a share of it: the blend may ask for one or two more, which the core's
    default of half a percent does not give where the share is small."""
    return float(max(0.005, np.max((share * (len(share) - 1) + 1) / np.ceil(num_samples * share))))
