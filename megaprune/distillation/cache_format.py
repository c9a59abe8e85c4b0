"""The teacher cache on disk: the encoding of a token, and the manifest.

A window of the packed data is a block of fixed size, so the place of any token is computed: block `w` holds the
window's tokens, which begin at token w * seq_length of the stream. A shard file holds a number of consecutive blocks,
followed by the CRC-32 of each (little-endian uint32, computed over the window's number and the block, so that a
misplaced block is detected). The manifest holds a digest of each shard's checksums and one of itself: a flipped bit
anywhere is detected.

A block holds columns, each over all its tokens s and their k largest logits in descending order; little-endian:

- the low 16 bits of each index, uint16 [s, k];
- each higher bit that the vocabulary needs, the lowest first, [s, k], packed as by numpy.packbits;
- fp16 [s, k]: first the log-odds of the top k against all other tokens, then each logit minus the largest;
- the logsumexp over the whole vocabulary, the upper 24 bits of its fp32, [s];
- the entropy of the full distribution in nats, fp16 [s].

At k = 10 that is 45 bytes a token up to a vocabulary of 65,536, and 47.5 up to 262,144 (18 bits).
docs/teacher-cache.md explains the choice.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from megaprune.distillation.losses import TeacherTargets, top_k_log_odds
from megaprune.utils.errors import MegapruneError
from megaprune.utils.files import write_json

MANIFEST = "manifest.json"
CHECKSUM_BYTES = 4
_FORMAT = "megaprune teacher cache"
FORMAT_VERSION = 1
_LOW_BITS = 16
_LARGEST_GAP = 65504.0  # fp16's largest number; exp(-65504) is 0
_SHARD_BYTES = 64 * 10**6
# A small data set is cut into about this many shards, so that the replicas can share the work.
_FEWEST_SHARDS = 256
_SMALLEST_SHARD_WINDOWS = 8


@dataclass(frozen=True)
class BlockLayout:
    """The layout of a window's targets in a block."""

    seq_length: int
    top_k: int
    vocab_size: int

    @property
    def index_bits(self) -> int:
        """Bits of a vocabulary index."""
        return max(_LOW_BITS, (self.vocab_size - 1).bit_length())

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return sum(self._column_bytes)

    @cached_property
    def _column_bytes(self) -> list[int]:
        picked = self.seq_length * self.top_k
        planes = [-(-picked // 8)] * (self.index_bits - _LOW_BITS)
        return [2 * picked, *planes, 2 * picked, 3 * self.seq_length, 2 * self.seq_length]

    def encode(self, targets: TeacherTargets) -> bytes:
        """Return the block of one window's targets [s, ...].

        Raises:
            ValueError: a number is not finite.
        """
        indices = targets.indices.cpu().numpy()
        planes = [np.packbits(((indices >> bit) & 1).astype(np.uint8)) for bit in range(_LOW_BITS, self.index_bits)]
        odds_and_gaps = torch.cat(
            [
                top_k_log_odds(targets).unsqueeze(-1),
                (targets.logits[..., 1:] - targets.logits[..., :1]).clamp_min(-_LARGEST_GAP),
            ],
            dim=-1,
        )
        columns = (odds_and_gaps, targets.logsumexp, targets.entropy)
        if not all(column.isfinite().all() for column in columns):
            raise ValueError("the teacher's logits are not finite")
        odds_and_gaps_16, logsumexp_32, entropy_16 = (column.float().cpu().numpy() for column in columns)
        # To the nearest: the bits of a float, taken as an integer, order as floats do.
        upper = (logsumexp_32.astype("<f4").view("<u4") + 0x80) >> 8
        return b"".join(
            [
                (indices & 0xFFFF).astype("<u2").tobytes(),
                *(plane.tobytes() for plane in planes),
                odds_and_gaps_16.astype("<f2").tobytes(),
                upper.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes(),
                entropy_16.astype("<f2").tobytes(),
            ]
        )

    def decode(self, block: np.ndarray, top_k: int) -> TeacherTargets:
        """Return a block's targets, [s, ...], with the first `top_k` logits.

        Args:
            block: uint8 [num_bytes].
        """
        low, *planes, packed, upper, entropy = np.split(block, np.cumsum(self._column_bytes)[:-1])
        shape = self.seq_length, self.top_k
        indices = low.view("<u2").reshape(shape).astype(np.int64)
        for bit, plane in enumerate(planes, start=_LOW_BITS):
            indices |= np.unpackbits(plane, count=indices.size).reshape(shape).astype(np.int64) << bit
        bits = np.zeros((self.seq_length, 4), np.uint8)
        bits[:, 1:] = upper.reshape(-1, 3)
        logsumexp = torch.from_numpy(bits.view("<f4").reshape(-1).astype(np.float32))
        values = torch.from_numpy(packed.view("<f2").reshape(shape).astype(np.float32))
        logits = F.pad(values[:, 1:], (1, 0))
        # The top k's share of the distribution is e^odds / (1 + e^odds).
        logits = logits + (logsumexp + F.logsigmoid(values[:, 0]) - logits.logsumexp(-1)).unsqueeze(-1)
        return TeacherTargets(
            torch.from_numpy(indices[:, :top_k].copy()),
            logits[:, :top_k].contiguous(),
            logsumexp,
            torch.from_numpy(entropy.view("<f2").astype(np.float32)),
        )


def block_checksum(block: bytes | np.ndarray, window: int) -> int:
    """Return the CRC-32 of a window's block."""
    return zlib.crc32(block if isinstance(block, bytes) else block.data, zlib.crc32(window.to_bytes(8, "little")))


@dataclass(frozen=True)
class CacheKey:
    """The inputs of a cache; its targets are valid for these alone.

    Args:
        model, tokenizer, data: their fingerprints.
        seq_length: tokens of a window; the teacher's context begins with the window.
        windows: number of windows in the data.
        vocab_size: of the model.
    """

    model: str
    tokenizer: str
    data: str
    seq_length: int
    windows: int
    vocab_size: int

    def check(self, wanted: "CacheKey", what: str, remedy: str) -> None:
        """Check that a cache was made from the wanted inputs.

        Raises:
            MegapruneError: it was made from others; names what differs.
        """
        for name, said in (("model", "another model"), ("tokenizer", "another tokenizer"), ("data", "other data")):
            if getattr(self, name) != getattr(wanted, name):
                raise MegapruneError(f"{what} was made from {said}: {remedy}")
        if self.seq_length != wanted.seq_length:
            raise MegapruneError(
                f"{what} was made with --seq-length {self.seq_length}, not {wanted.seq_length}: {remedy}"
            )
        if self != wanted:
            raise MegapruneError(f"{what} was made from other windows: {remedy}")


@dataclass(frozen=True)
class CachePlan:
    """The properties of a cache that follow from its key, before it is made.

    Args:
        computed_in: the dtype of the teacher's weights, ``fp32`` or ``bf16``.
    """

    key: CacheKey
    top_k: int
    computed_in: str

    @cached_property
    def layout(self) -> BlockLayout:
        """The layout of the blocks."""
        return BlockLayout(self.key.seq_length, self.top_k, self.key.vocab_size)

    @property
    def windows_per_shard(self) -> int:
        """Windows of every shard but the last; independent of the parallel layout."""
        fits = max(1, _SHARD_BYTES // (self.layout.num_bytes + CHECKSUM_BYTES))
        return min(fits, max(_SMALLEST_SHARD_WINDOWS, -(-self.key.windows // _FEWEST_SHARDS)))

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return -(-self.key.windows // self.windows_per_shard)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return self.key.windows * (self.layout.num_bytes + CHECKSUM_BYTES)

    def windows_of(self, shard: int) -> range:
        """Return the windows that a shard holds."""
        first = shard * self.windows_per_shard
        return range(first, min(first + self.windows_per_shard, self.key.windows))

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file."""
        return len(self.windows_of(shard)) * (self.layout.num_bytes + CHECKSUM_BYTES)

    def record(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return asdict(self)


def shard_name(shard: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:05d}.bin"


def checksums_digest(checksums: bytes) -> str:
    """Return the digest of a shard's checksums, for the manifest."""
    return hashlib.blake2b(checksums, digest_size=16).hexdigest()


def write_manifest(folder: Path, plan: CachePlan, digests: list[str]) -> None:
    """Write the manifest of a folder that holds all shards.

    Args:
        digests: `checksums_digest` of each shard.
    """
    layout = plan.layout
    record = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        **plan.record(),
        "tokens": plan.key.windows * plan.key.seq_length,
        "dtype": "float16",
        "index_bits": layout.index_bits,
        "block_bytes": layout.num_bytes,
        "windows_per_shard": plan.windows_per_shard,
        "shards": [
            {
                "file": shard_name(shard),
                "windows": len(plan.windows_of(shard)),
                "bytes": plan.shard_bytes(shard),
                "checksum": digest,
            }
            for shard, digest in enumerate(digests)
        ],
    }
    write_json(folder / MANIFEST, record | {"checksum": _digest(record)})


def read_manifest(folder: Path, flag: str) -> tuple[CachePlan, list[str]]:
    """Return the plan of a finished cache, and `checksums_digest` of each of its shards.

    Args:
        flag: the flag that names the folder.

    Raises:
        MegapruneError: there is no cache, it is damaged, or it has a version that this code does not read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise MegapruneError(f"{flag} {folder} holds no {MANIFEST}: give the folder of a finished cache")
    try:
        record = json.loads(path.read_bytes())
        checksum = record.pop("checksum")
        if record["format"] != _FORMAT or checksum != _digest(record):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MegapruneError(f"{path} is damaged: create the cache again with cache_teacher.py") from None
    if record["version"] != FORMAT_VERSION:
        raise MegapruneError(
            f"{path} has format version {record['version']}, but this release reads version {FORMAT_VERSION}: "
            "create the cache again"
        )
    plan = CachePlan(CacheKey(**record["key"]), record["top_k"], record["computed_in"])
    if record["windows_per_shard"] != plan.windows_per_shard or record["block_bytes"] != plan.layout.num_bytes:
        raise MegapruneError(
            f"{path} was written with other shards ({record['windows_per_shard']} windows of {record['block_bytes']} "
            f"bytes each, now {plan.windows_per_shard} of {plan.layout.num_bytes}): create the cache again"
        )
    return plan, [shard["checksum"] for shard in record["shards"]]


def _digest(record: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
