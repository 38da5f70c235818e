"""Keeping published digits: how far vectors are from being encoded as they were, as a loss that is 0 where they are.

Encoding chooses a digit for what the digits before it left of a vector. Given that those are as published, a digit stays
while what is left lies nearer to the published row of its table than to any other. On the way from the published row (0) to
another (1), that is below 1/2; a margin asks for a little more, so that rounding and the next step of training change nothing.
Every digit counts alike, whether its rows are long or short: a SID is another one whichever of its digits changed.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def moved(
    z_ND: Tensor, offset_D: Tensor, digit_tables: Sequence[Tensor], published_NL: Tensor, *, margin: float
) -> Tensor:
    """By vector, the sum over digits of how far it is beyond keeping the published one: 0 where greedy encoding keeps all.

    That is exact for digits of one choice: one-hot ones, and grids of a single coordinate. Of a grid of several, whose
    coordinates are chosen one after another, it looks at all values at once, which is the same where its rows are orthogonal.

    Args:
        z_ND: float [N, D].
        offset_D, digit_tables: of the codec.
        published_NL: integers [N, L].
        margin: how far from the middle between two rows to stay, of the way from one to the other; below 1/2.

    Returns:
        float [N]; differentiable by the vectors.
    """
    left_ND = z_ND - offset_D
    total_N = z_ND.new_zeros(len(z_ND))
    for table_KD, digit_N in zip(digit_tables, published_NL.long().unbind(1), strict=True):
        place_N = _place(left_ND, table_KD, digit_N)
        total_N = total_N + (place_N - (0.5 - margin)).relu()
        left_ND = left_ND - table_KD[digit_N]
    return total_N


def _place(left_ND: Tensor, table_KD: Tensor, digit_N: Tensor) -> Tensor:
    """How far each vector is on its way from its row of the table to the nearest other one, by what part of it, float [N]."""
    gram_KK = table_KD @ table_KD.T
    norm_K = gram_KK.diagonal()
    product_NK = left_ND @ table_KD.T
    own_N1 = digit_N.unsqueeze(1)
    # <left - own, other - own> / |other - own|^2
    gap_NK = product_NK - product_NK.gather(1, own_N1) - gram_KK[digit_N] + norm_K[own_N1]
    length_NK = norm_K + norm_K[own_N1] - 2 * gram_KK[digit_N]
    is_other_NK = length_NK > 1e-6 * norm_K.max()  # a row's twin is no other row
    place_NK = torch.where(is_other_NK, gap_NK / torch.where(is_other_NK, length_NK, 1.0), -math.inf)
    return place_NK.amax(1)
