"""A fingerprint of a model: a digest of samples of the data that its logits are computed from.

It covers the config and, for every tensor in the family's tables, the name, shape, dtype and the numbers of a few rows,
at positions that follow from the name; one-dimensional tensors are covered completely. It takes seconds; hashing all
bytes of a large model would take hours. It distinguishes models whose training differs by as little as one step,
because training changes nearly every number. It does not notice manual edits of rows that are not sampled.

The same model has the same fingerprint as an HF folder and as an imported checkpoint, in any division into files.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

import torch

from megaprune.weights.tensor_source import TensorSource

_ROWS = 4
# What a config says of a model's files and of the libraries that wrote them, not of its logits.
_BOOKKEEPING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config", "auto_map")


def fingerprinted_tensors(source: TensorSource) -> list[str]:
    """Return the HF tensors that a fingerprint covers, in order."""
    return sorted({name for rule in source.family.rules(source.config) for name in rule.hf})


def tensor_digests(source: TensorSource, names: Sequence[str]) -> dict[str, str]:
    """Return the digest of each named tensor, from its shape, dtype and samples."""
    return {name: _tensor_digest(source, name) for name in names}


def model_fingerprint(source: TensorSource, digests: Mapping[str, str]) -> str:
    """Return the hex digest of a model.

    Args:
        digests: `tensor_digests` of all `fingerprinted_tensors`.
    """
    config = {key: value for key, value in source.config.items() if key not in _BOOKKEEPING}
    described = json.dumps([config, dict(digests)], sort_keys=True)
    return hashlib.blake2b(described.encode(), digest_size=16).hexdigest()


def _tensor_digest(source: TensorSource, name: str) -> str:
    shape = source.shape(name)
    digest = hashlib.blake2b(f"{name} {list(shape)} {source.dtype(name)}".encode(), digest_size=16)
    if len(shape) < 2:
        digest.update(_bytes_of(source.read(name)))
    else:
        for number in range(_ROWS):
            place = hashlib.blake2b(f"{name} {number}".encode(), digest_size=8).digest()
            row = int.from_bytes(place, "little") % shape[0]
            digest.update(_bytes_of(source.read(name, 0, row, row + 1)))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
