"""How well SIDs tell items apart, generation by generation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.report import DigitUse, PrefixGroups

_BLOCK = 1 << 16


@dataclass(frozen=True)
class SIDQuality:
    """What can be said of a corpus by its SIDs alone.

    Args:
        items: how many.
        unique: distinct SIDs by items: 1 if every item has its own.
        colliding: share of the items whose SID another item has, of the same generation or an earlier one.
        largest: items of the most frequent SID.
        gini: of items by SID, over the SIDs that occur: 0 if all have equally many, towards 1 if few have nearly all.
        entropy: bits of each digit, at most log2 of its radix.
        used: share of what digits can hold that they do: the sum of their entropies by that of log2 of their radices.
    """

    items: int
    unique: float
    colliding: float
    largest: int
    gini: float
    entropy: tuple[float, ...]
    used: float


def qualities(spec: SIDSpec, words: Sequence[np.ndarray]) -> tuple[list[SIDQuality], SIDQuality]:
    """Quality of each generation, and of all together.

    Args:
        spec: of the SIDs.
        words: by generation, in the order they were published, int64 [N, W], at least one item each.
    """
    all_NW = np.concatenate(words)
    generation_N = np.repeat(np.arange(len(words)), [len(words_NW) for words_NW in words])
    groups = PrefixGroups.of(spec, all_NW)
    collides_N = _collides(groups, generation_N)
    each = [_quality(spec, words_NW, float(collides_N[generation_N == g].mean())) for g, words_NW in enumerate(words)]
    sizes_G = groups.sizes(spec.num_digits)
    return each, _quality(spec, all_NW, float(sizes_G[sizes_G > 1].sum() / len(all_NW)))


def gini(sizes_G: np.ndarray) -> float:
    """Gini coefficient of numbers above 0: half their mean difference by their mean."""
    ordered_G, count = np.sort(sizes_G).astype(np.float64), len(sizes_G)
    rank_G = 2 * np.arange(1, count + 1) - count - 1
    return float((rank_G * ordered_G).sum() / (count * ordered_G.sum()))


def _quality(spec: SIDSpec, words_NW: np.ndarray, colliding: float) -> SIDQuality:
    use = DigitUse(spec)
    for first in range(0, len(words_NW), _BLOCK):
        use.update(spec.unpack(words_NW[first : first + _BLOCK]))
    sizes_G, entropy = PrefixGroups.of(spec, words_NW).sizes(spec.num_digits), tuple(use.entropy())
    most = sum(math.log2(radix) for radix in spec.radices)
    return SIDQuality(
        items=len(words_NW),
        unique=len(sizes_G) / len(words_NW),
        colliding=colliding,
        largest=int(sizes_G.max()),
        gini=gini(sizes_G),
        entropy=entropy,
        used=sum(entropy) / most if most else 1.0,
    )


def _collides(groups: PrefixGroups, generation_N: np.ndarray) -> np.ndarray:
    """Whether another item of the same or an earlier generation has an item's SID, bool [N]."""
    depth = groups.spec.num_digits
    starts_G, sizes_G = groups.starts(depth), groups.sizes(depth)
    collides_N = np.ones(len(generation_N), bool)
    # rows of one SID stand in the order they were published: only the first can have none before it
    first_G = groups.order_N[starts_G]
    second_G = groups.order_N[np.minimum(starts_G + 1, len(generation_N) - 1)]
    collides_N[first_G] = (sizes_G > 1) & (generation_N[first_G] == generation_N[second_G])
    return collides_N
