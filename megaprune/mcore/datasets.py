"""Megatron-Core's indexed datasets: the writer, and blended training datasets."""

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
    """Return the dtype in which Megatron stores the tokens of a vocabulary."""
    return np.dtype(DType.optimal_dtype(vocab_size))


def new_builder(bin_path: Path, dtype: np.dtype) -> IndexedDatasetBuilder:
    """Return Megatron's writer of an indexed dataset that stores tokens in `bin_path`."""
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype.type)
    # Arrays take a tenth of the memory of lists. No other part of the builder grows with the number of documents.
    builder.sequence_lengths, builder.document_indices = array("i"), array("q", [0])
    return builder


class _Vocabulary:
    """The attributes of a tokenizer that GPTDataset reads."""

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
    """Return at least `num_samples` samples of the datasets, blended and shuffled by Megatron. Collective.

    Args:
        prefixes: absolute path prefixes of the datasets. The names of the index files depend on them.
        weights: weight of each dataset; they need not sum to 1.
        num_samples: number of samples needed.
        seq_length: tokens in a sample.
        seed: seed of the shuffling.
        vocab_size: size of the vocabulary.
        eod: end-of-document token.
        index_folder: folder of the index files, which are memory-mapped.
        build: True: rank 0 writes the index files, and the other ranks get None. False: all ranks map existing files.

    Returns:
        A GPTDataset, or a BlendedDataset of several.

    Raises:
        MegapruneError: the compiled helpers of megatron-core are missing.
    """
    try:
        # The core imports the helpers on first use. Its own suggestion, compile_helpers, needs a Makefile that wheels
        # do not contain.
        from megatron.core.datasets import helpers  # noqa: F401
    except ImportError as error:
        raise MegapruneError(
            f"megatron-core was installed without its compiled dataset helpers ({error}): install a wheel built for "
            "this "
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
    """Return the number of samples of each dataset that a blend of `num_samples` samples indexes, [datasets]."""
    share = _shares(weights)
    if len(share) == 1:
        return np.array([num_samples])
    return np.ceil(np.ceil(num_samples * share) * (1 + _surplus(share, num_samples)))


def _shares(weights: Sequence[float]) -> np.ndarray:
    return np.asarray(weights, np.float64) / np.sum(weights)


def _surplus(share: np.ndarray, num_samples: int) -> float:
    """Return the surplus of samples to index per dataset, as a fraction of the dataset's share.

    A blend may need one or two samples more than a dataset's share. The core's default surplus of 0.5 % does not cover
    them if the share is small.
    """
    return float(max(0.005, np.max((share * (len(share) - 1) + 1) / np.ceil(num_samples * share))))
