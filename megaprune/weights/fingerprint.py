"""A fingerprint of a model: what its logits are computed from, by samples.

It covers the config and, of every tensor that the family's tables name, the name, shape, dtype and the numbers of a
few rows, at places that follow from the name; tensors of one dimension whole. So it takes seconds where hashing all
bytes of a large model would take hours. It tells apart models that were trained apart, if only for a step: training
moves nearly every number. It does not see an edit by hand of rows that are no samples.

The same model has the same fingerprint as an HF folder and as an imported checkpoint, whatever files hold it.
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
