"""Ridge least squares that weighs itself: how far to trust each stage's rows, and along which directions.

A codeword that few vectors use is their mean plus noise, and least squares learns the noise too. Along the first
principal axes codewords carry much energy and little noise; along the last it is the other way round. So the ridge has a
weight for each stage and each band of principal axes: the ratio of noise to prior variance under which the data is most
probable. It needs no held-out vectors and nothing to tune.

Source: the evidence framework, MacKay 1992, "Bayesian Interpolation", section 4, with one precision per group of rows.
"""

from itertools import pairwise

import torch
from torch import Tensor

_FIRST_BAND = 8  # axes; each further band ends at twice the axis the one before ended at
_LEAST_WEIGHT = 1e-9  # per vector: keeps the normal equations solvable where stages share a direction
_TINY = 1e-30


def bands(dim: int) -> list[int]:
    """Number of principal axes of each band, the first axes in the narrowest: 8, 8, 16, 32, ... and the rest."""
    ends = [0, min(_FIRST_BAND, dim)]
    while ends[-1] < dim:
        ends.append(min(2 * ends[-1], dim))
    return [end - start for start, end in pairwise(ends)]


def shrunk_rows(
    gram_RR: Tensor, cross_RD: Tensor, energy_D: Tensor, weight_SB: Tensor, widths: list[int], count: int
) -> tuple[Tensor, Tensor]:
    """argmin_U |X - A U|^2 + sum over stages s, bands b of weight_sb |U_sb|^2; and better weights.

    Args:
        gram_RR: float64, A^T A of the codes.
        cross_RD: float64, A^T X along the principal axes.
        energy_D: float64, |X|^2 along each axis.
        weight_SB: float64 [S, bands].
        widths: rows of each stage.
        count: number of vectors N.

    Returns:
        The rows' posterior mean along the principal axes, float64 [R, D]; and weights nearer to the most probable ones,
        [S, bands], for the next call.
    """
    stage_R = torch.arange(len(widths), device=gram_RR.device).repeat_interleave(
        torch.tensor(widths, device=gram_RR.device)
    )
    basis, weight = [], []
    sizes = bands(len(energy_D))
    for b, (cross_RC, energy_C) in enumerate(zip(cross_RD.split(sizes, 1), energy_D.split(sizes), strict=True)):
        weight_R = weight_SB[stage_R, b]
        factor_RR = torch.linalg.cholesky(gram_RR + weight_R.diag())
        basis_RC = torch.cholesky_solve(cross_RC, factor_RR)
        eye_RR = torch.eye(len(gram_RR), dtype=gram_RR.dtype, device=gram_RR.device)
        inverse_R = torch.linalg.solve_triangular(factor_RR, eye_RR, upper=False).square().sum(0)
        # the share of each row's freedom that the data decides; the ridge decides the rest
        free_R = (1 - weight_R * inverse_R).clamp_min(0)
        left = energy_C.sum() + (basis_RC * (gram_RR @ basis_RC - 2 * cross_RC)).sum()
        noise = left.clamp_min(0) / (count - free_R.sum()).clamp_min(1)
        square_S = _sum_by_stage(basis_RC.square().sum(1), stage_R, len(widths))
        prior_S = square_S / _sum_by_stage(free_R, stage_R, len(widths)).clamp_min(_TINY)
        basis.append(basis_RC)
        # no more than one for each vector: a stage of no use yet must be able to recover
        weight.append((noise / prior_S.clamp_min(_TINY)).clamp(_LEAST_WEIGHT * max(count, 1), max(count, 1)))
    return torch.cat(basis, 1), torch.stack(weight, 1)


def _sum_by_stage(x_R: Tensor, stage_R: Tensor, num_stages: int) -> Tensor:
    return x_R.new_zeros(num_stages).index_add_(0, stage_R, x_R)
