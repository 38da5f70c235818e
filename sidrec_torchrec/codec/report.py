"""How SIDs are used: how often each value of each digit occurs, and which items share a prefix."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sidrec_torchrec.codec.packing import SIDSpec

_BLOCK = 1 << 16  # SIDs unpacked at once


class DigitUse:
    """Counts of the values of each digit; adds up over batches, files and processes.

    Args:
        spec: of the SIDs.

    Attributes:
        counts: per digit, int64 [radix_j].
    """

    def __init__(self, spec: SIDSpec) -> None:
        self.spec = spec
        self.counts = [np.zeros(radix, np.int64) for radix in spec.radices]

    def update(self, digits_NL: np.ndarray) -> None:
        """Counts digits of SIDs, integers [N, L]."""
        for counts, digit_N in zip(self.counts, digits_NL.T, strict=True):
            counts += np.bincount(digit_N, minlength=len(counts))

    def entropy(self) -> list[float]:
        """Bits per digit: log2(radix) if all values occur equally often, 0 if one alone does."""
        return [entropy(counts) for counts in self.counts]

    def idle(self) -> list[int]:
        """Which digits, from 0, say next to nothing: less than a tenth of the bits that they could."""
        bits = zip(self.entropy(), self.spec.radices, strict=True)
        return [digit for digit, (says, radix) in enumerate(bits) if radix > 1 and says < math.log2(radix) / 10]

    def unused(self) -> list[int]:
        """Values per digit that never occur: dead ones, once the SIDs are many."""
        return [int((counts == 0).sum()) for counts in self.counts]


@dataclass(frozen=True)
class PrefixUse:
    """What a number of first digits tells apart.

    Args:
        digits: how many first digits.
        distinct: prefixes that occur.
        entropy: of the prefix, in bits.
        shared: items that share their prefix with another.
        largest: items of the most frequent prefix.
    """

    digits: int
    distinct: int
    entropy: float
    shared: int
    largest: int


@dataclass(frozen=True, eq=False)
class PrefixGroups:
    """Items grouped by their first digits, at every depth, from one sort. Made by ``of``.

    Words sort as digits do, so the items of any prefix stand together, and a group begins wherever fewer digits are
    shared with the row before. Takes 10 bytes an item beside the words.

    Args:
        spec: of the SIDs.
        order_N: int64 [N], rows in the order of their SIDs; those of equal SIDs in their own order.
        shared_N: int16 [N], in that order: first digits shared with the row before; -1 in the first.
    """

    spec: SIDSpec
    order_N: np.ndarray
    shared_N: np.ndarray

    @staticmethod
    def of(spec: SIDSpec, words_NW: np.ndarray) -> "PrefixGroups":
        """Groups packed SIDs, int64 [N, W]."""
        order_N = np.lexsort(words_NW.T[::-1])  # stable; the last key is the first to decide
        shared_N = np.full(len(words_NW), -1, np.int16)
        for first in range(1, len(words_NW), _BLOCK):
            digits_NL = spec.unpack(words_NW[order_N[first - 1 : first + _BLOCK]])
            shared_N[first : first + _BLOCK] = shared_digits(digits_NL[1:], digits_NL[:-1])
        return PrefixGroups(spec, order_N, shared_N)

    def starts(self, depth: int) -> np.ndarray:
        """Where in ``order_N`` the groups of ``depth`` first digits begin, int64 [G]."""
        return np.flatnonzero(self.shared_N < depth)

    def sizes(self, depth: int) -> np.ndarray:
        """Items of each group, int64 [G]."""
        return np.diff(self.starts(depth), append=len(self.order_N))

    def labels(self, depth: int) -> np.ndarray:
        """The group of each row, int64 [N] in [0, G), in the rows' own order."""
        label_N = np.empty(len(self.order_N), np.int64)
        label_N[self.order_N] = np.cumsum(self.shared_N < depth) - 1
        return label_N

    def ranks(self) -> np.ndarray:
        """How many earlier rows have the same SID, int64 [N]."""
        starts_G, depth = self.starts(self.spec.num_digits), self.spec.num_digits
        rank_N = np.empty(len(self.order_N), np.int64)
        rank_N[self.order_N] = np.arange(len(self.order_N)) - np.repeat(starts_G, self.sizes(depth))
        return rank_N

    def use(self, depth: int) -> PrefixUse:
        """What ``depth`` first digits tell apart."""
        sizes_G = self.sizes(depth)
        return PrefixUse(
            digits=depth,
            distinct=len(sizes_G),
            entropy=entropy(sizes_G),
            shared=int(sizes_G[sizes_G > 1].sum()),
            largest=int(sizes_G.max(initial=0)),
        )

    def result(self) -> list[dict[str, Any]]:
        """``use`` of every depth, 1 to L, as a JSON value."""
        return [asdict(self.use(depth)) for depth in range(1, self.spec.num_digits + 1)]


def shared_sids(words_NW: np.ndarray) -> tuple[int, int]:
    """Of packed SIDs, int64 [N, W]: how many items share theirs with another, and the most that share one."""
    order_N = np.lexsort(words_NW.T[::-1])
    is_new_N = np.ones(len(words_NW), bool)
    is_new_N[1:] = (words_NW[order_N[1:]] != words_NW[order_N[:-1]]).any(axis=1)
    sizes_G = np.diff(np.flatnonzero(is_new_N), append=len(words_NW))
    return int(sizes_G[sizes_G > 1].sum()), int(sizes_G.max(initial=0))


def shared_digits(a_NL: np.ndarray, b_NL: np.ndarray) -> np.ndarray:
    """How many first digits rows have in common, int64 [N]."""
    return np.logical_and.accumulate(a_NL == b_NL, axis=1).sum(1)


def entropy(counts: np.ndarray) -> float:
    """Of a distribution given by counts, in bits; 0 without any."""
    share = counts[counts > 0] / max(counts.sum(), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0  # no -0
