"""``greedy``: digits of vectors by greedy search in float32, and whether rounding could have changed them.

What the numbers mean stands in ``codec/plan.py``: levels y = weight z + bias, of which a coordinate's digit is ceil(y), and one
of several codewords the least; each digit then changes the levels of later choices.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sidrec_torchrec.ops.kernels import LIBRARY, base

LARGEST = 1e9  # sums of products of three such numbers stay finite


def reference(
    z_ND: Tensor,
    weight_RD: Tensor,
    bias_R: Tensor,
    pull_RR: Tensor,
    widths: Sequence[int],
    counts: Sequence[int],
    stages: Sequence[int],
    reaches: Sequence[float],
    tie: float,
    unit_error: float,
    size: float,
    error_N: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Digits of S choices, one after another.

    Args:
        z_ND: vectors, float32.
        weight_RD, bias_R: of the levels, float32; R rows, those of the first choice first.
        pull_RR: float32 [column, row]: what a digit 1 of the coordinate, or the codeword, of the column adds to the level of
            the row.
        widths: rows of each choice; 1 for a coordinate.
        counts: digits of each choice.
        stages: the stage that each choice decides, or a part of which; ascending.
        reaches: how far a vector of length 1 can move the levels of each choice.
        tie: codewords as near as this tie, and the first is taken.
        unit_error: error of a level per reach and length of the vector, and
        size: what counts like length besides.
        error_N: float32, by how much the vectors themselves may be off, in length; None for not at all.

    Returns:
        Digits of stages, int16 [N, L], and whether they are surely those of exact arithmetic, bool [N]; where not, digits may
        be anything.
    """
    norm_N = torch.linalg.vector_norm(z_ND, dim=1)
    bound_N = unit_error * (norm_N + size) + (0 if error_N is None else error_N)
    known_N = (norm_N < LARGEST) & (bound_N < torch.inf)  # not so where it is NaN
    bound_N = torch.where(known_N, bound_N, torch.inf)
    y_RN = torch.addmm(bias_R.unsqueeze(1), weight_RD, torch.where(known_N.unsqueeze(1), z_ND, 0).T)
    digits_NL = z_ND.new_zeros(len(z_ND), stages[-1] + 1)
    sure_N = known_N
    first = 0
    for width, count, stage, reach in zip(widths, counts, stages, reaches, strict=True):
        own_WN = y_RN[first : first + width]
        if width == 1:
            level_N = own_WN[0].clamp(-0.5, count - 1.5)
            digit_N = level_N.ceil()
            sure_N = sure_N & ((level_N.round() - level_N).abs() > reach * bound_N)
            y_RN = y_RN + pull_RR[first].unsqueeze(1) * digit_N
        else:
            least_N, index_N = own_WN.min(0)
            near_WN = own_WN <= least_N + (2 * reach * bound_N + tie)
            sure_N = sure_N & (near_WN.sum(0) == 1)
            digit_N = index_N.to(z_ND)
            y_RN = y_RN + pull_RR[first + index_N].T
        digits_NL[:, stage] = digits_NL[:, stage] * count + digit_N
        first += width
    return digits_NL.to(torch.int16), sure_N


# Not by ``torch.library.custom_op``, whose first call imports Dynamo: a second, for a job that compiles nothing.
_SCHEMA = (
    "(Tensor z, Tensor weight, Tensor bias, Tensor pull, int[] widths, int[] counts, int[] stages, float[] reaches, "
    "float tie, float unit_error, float size, Tensor? error) -> (Tensor, Tensor)"
)
LIBRARY.define("greedy" + _SCHEMA)
LIBRARY.impl("greedy", base("greedy", reference, _SCHEMA), "CompositeExplicitAutograd")
greedy = torch.ops.sidrec.greedy.default


@torch.library.register_fake("sidrec::greedy", lib=LIBRARY)
def _(z_ND, weight_RD, bias_R, pull_RR, widths, counts, stages, reaches, tie, unit_error, size, error_N):
    return z_ND.new_empty(len(z_ND), stages[-1] + 1, dtype=torch.int16), z_ND.new_empty(len(z_ND), dtype=torch.bool)
