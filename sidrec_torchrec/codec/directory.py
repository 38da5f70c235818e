"""Finding keys among millions by their hash, in plain arrays that can lie in a file and be mapped by many processes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK = 1 << 15  # keys looked up at once: what they need stays in cache


@dataclass(frozen=True, eq=False)
class Directory:
    """Buckets of entries by the first bits of their hash; entries lie bucket after bucket. Made by ``build``.

    A lookup reads two neighbouring numbers here and then, mostly, one entry or two: about as many as there are in a bucket.

    Args:
        starts: uint32 or int64 [2^bits + 1], where in the entries each bucket begins.
    """

    starts: np.ndarray

    @staticmethod
    def build(hash_N: np.ndarray) -> tuple["Directory", np.ndarray]:
        """The directory of entries with these hashes, uint64 [N], and the order to lay them in, int64 [N]; stable."""
        count = len(hash_N)
        bits = max(1, (count - 1).bit_length()) if count else 1
        bucket_N = (hash_N >> np.uint64(64 - bits)).astype(np.int64)
        order_N = np.argsort(bucket_N, kind="stable")
        starts = np.zeros((1 << bits) + 1, np.int64)
        np.cumsum(np.bincount(bucket_N, minlength=1 << bits), out=starts[1:])
        return Directory(starts.astype(np.uint32) if count < 1 << 32 else starts), order_N

    def find(self, hash_M: np.ndarray, is_same: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
        """Place of each key among the entries, int64 [M]; -1 where there is none.

        Args:
            hash_M: uint64 [M], of the keys.
            is_same: of places and rows of the keys, int64 [A] each: which place holds the key of that row, bool [A].
        """
        place_M = np.full(len(hash_M), -1, np.int64)
        shift = np.uint64(65 - len(self.starts).bit_length())
        for block in _blocks(len(hash_M)):
            bucket = (hash_M[block] >> shift).astype(np.int64)
            at, end = self.starts[bucket].astype(np.int64), self.starts[bucket + 1].astype(np.int64)
            rows = np.flatnonzero(at < end)
            at, end = at[rows], end[rows]
            while len(rows):
                found = is_same(at, rows + block.start)
                place_M[rows[found] + block.start] = at[found]
                at += 1
                left = np.flatnonzero(~found & (at < end))
                rows, at, end = rows[left], at[left], end[left]
        return place_M


def mix(*columns: np.ndarray) -> np.ndarray:
    """A hash of rows of int64 or uint64 numbers, given as columns [N]: uint64 [N], all its bits as good as random.

    Source: SplitMix64's mixer (Steele et al. 2014), once for each column.
    """
    hash_N = np.zeros(len(columns[0]), np.uint64)
    for column_N in columns:
        hash_N = (hash_N + np.uint64(0x9E3779B97F4A7C15)) ^ column_N.astype(np.uint64, copy=False)
        hash_N = (hash_N ^ (hash_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        hash_N = (hash_N ^ (hash_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        hash_N ^= hash_N >> np.uint64(31)
    return hash_N


def _blocks(count: int) -> Iterator[slice]:
    return (slice(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK))
