"""How SIDs move: between two codecs over the same items, and between two corpora under one codec.

Two codecs give their digits different meanings: after a retraining, the cluster that was digit 17 may be digit 4. So beside
the share of items whose prefix changed, which tells what must be written again, stands a figure that does not look at names:
whether the items that shared a prefix still share one.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.report import DigitUse, PrefixGroups, entropy, shared_digits

_BLOCK = 1 << 16


@dataclass(frozen=True)
class PrefixDrift:
    """How the first digits of the same items differ between two sets of SIDs.

    Args:
        old_digits: first digits looked at in the old SIDs.
        new_digits: in the new ones: the prefix that holds most nearly as many bits.
        bits: that the old prefix can hold.
        changed: share of items whose prefix is another; None where the two prefixes have different stages.
        agreement: adjusted Rand index of the two groupings of the items by prefix: 1 if the same items share prefixes,
            0 as by chance. None where no two items share one.
    """

    old_digits: int
    new_digits: int
    bits: float
    changed: float | None
    agreement: float | None


@dataclass(frozen=True)
class DigitDrift:
    """How a digit's distribution differs between two corpora under one codec.

    Args:
        divergence: Jensen-Shannon divergence in bits: 0 if equal, 1 if no value occurs in both. (The population stability
            index, its older relative, is infinite as soon as a value occurs in one corpus alone.)
        chance: what to expect of two independent samples of one distribution, of these sizes.
        old_entropy: bits.
        new_entropy: bits.
        newly_used: values that occur in the new corpus alone.
        no_longer_used: values that occur in the old corpus alone.
    """

    divergence: float
    chance: float
    old_entropy: float
    new_entropy: float
    newly_used: int
    no_longer_used: int


def prefix_drift(old: SIDSpec, old_NW: np.ndarray, new: SIDSpec, new_NW: np.ndarray) -> list[PrefixDrift]:
    """Compares two SIDs of each item, at every number of first digits of the old one.

    Args:
        old: of the old SIDs.
        old_NW: int64 [N, W], at least one item.
        new: of the new SIDs.
        new_NW: int64 [N, W'], the same items in the same order.

    Raises:
        ValueError: if there are no items, or not equally many.
    """
    if len(old_NW) != len(new_NW) or not len(old_NW):
        raise ValueError(f"expected two SIDs of each item; got {len(old_NW)} old and {len(new_NW)} new ones")
    changed = _changed(old, old_NW, new, new_NW)
    old_groups, new_groups = PrefixGroups.of(old, old_NW), PrefixGroups.of(new, new_NW)
    old_bits, new_bits = (list(accumulate(math.log2(radix) for radix in spec.radices)) for spec in (old, new))
    drift = []
    for depth, bits in enumerate(old_bits, start=1):
        new_depth = 1 + int(np.argmin(np.abs(np.array(new_bits) - bits)))
        drift.append(
            PrefixDrift(
                old_digits=depth,
                new_digits=new_depth,
                bits=bits,
                changed=changed[depth - 1] if depth <= len(changed) else None,
                agreement=adjusted_rand(old_groups.labels(depth), new_groups.labels(new_depth)),
            )
        )
    return drift


def digit_drift(old: DigitUse, new: DigitUse) -> list[DigitDrift]:
    """Compares how two corpora use each digit of one codec."""
    drift = []
    for old_K, new_K in zip(old.counts, new.counts, strict=True):
        drift.append(
            DigitDrift(
                divergence=jensen_shannon(old_K, new_K),
                chance=_chance(old_K, new_K),
                old_entropy=entropy(old_K),
                new_entropy=entropy(new_K),
                newly_used=int(((old_K == 0) & (new_K > 0)).sum()),
                no_longer_used=int(((old_K > 0) & (new_K == 0)).sum()),
            )
        )
    return drift


def adjusted_rand(a_N: np.ndarray, b_N: np.ndarray) -> float | None:
    """Agreement of two groupings of N items, labels int64 [N] from 0 on; None if no grouping puts two items together.

    Of all pairs of items, those together in both, above chance: 1 for equal groupings, around 0 for unrelated ones.
    Counts pairs, so it costs one sort, where mutual information would need its chance level summed over all pairs of groups.

    Source: Hubert & Arabie 1985, equation 5.
    """
    together = _pairs(np.unique(a_N * (int(b_N.max()) + 1) + b_N, return_counts=True)[1])
    a, b, total = _pairs(np.bincount(a_N)), _pairs(np.bincount(b_N)), math.comb(len(a_N), 2)
    if a == b == 0:
        return None
    if a == b == total:
        return 1.0
    chance = a * b / total
    return (together - chance) / ((a + b) / 2 - chance)


def jensen_shannon(p_K: np.ndarray, q_K: np.ndarray) -> float:
    """Jensen-Shannon divergence of two distributions given by counts, in bits.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", with equal weights.
    """
    p_K, q_K = (counts / max(counts.sum(), 1) for counts in (p_K, q_K))
    return max(entropy((p_K + q_K) / 2) - (entropy(p_K) + entropy(q_K)) / 2, 0.0)


def _changed(old: SIDSpec, old_NW: np.ndarray, new: SIDSpec, new_NW: np.ndarray) -> list[float]:
    """Share of items whose first k digits differ, for k = 1 to the number of first stages that both have."""
    stages = min(old.num_digits, new.num_digits)
    comparable = next((j for j in range(stages) if old.stages[j] != new.stages[j]), stages)
    counts = np.zeros(comparable + 1, np.int64)
    for first in range(0, len(old_NW), _BLOCK):
        block = slice(first, first + _BLOCK)
        digits = (spec.unpack(words[block])[:, :comparable] for spec, words in ((old, old_NW), (new, new_NW)))
        counts += np.bincount(shared_digits(*digits), minlength=comparable + 1)
    return (np.cumsum(counts)[:-1] / len(old_NW)).tolist()


def _pairs(counts: np.ndarray) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _chance(old_K: np.ndarray, new_K: np.ndarray) -> float:
    """Mean divergence of two samples of one distribution, to second order: (values - 1) / 8 (1/N + 1/N'), in nats."""
    values = int(((old_K + new_K) > 0).sum())
    return (values - 1) / 8 * (1 / max(old_K.sum(), 1) + 1 / max(new_K.sum(), 1)) / math.log(2)
