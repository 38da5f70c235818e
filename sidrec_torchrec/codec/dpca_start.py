"""Where learning DPCA's basis starts: one stage after another, each on what those before left of a sample."""

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot
from sidrec_torchrec.codec.kmeans import kmeans
from sidrec_torchrec.codec.search import encode

_ALTERNATIONS = 12  # of codes and rows, to start a stage that is not one-hot
_TINY = 1e-9


def start(x_ND: Tensor, stages: tuple[Alphabet, ...], seed: int) -> Tensor:
    """A first basis for centered vectors, float64 [R, D]: k-means for one-hot stages, principal axes for others."""
    parts, residual_ND = [], x_ND.clone()
    moment_DD = residual_ND.T @ residual_ND
    for i, stage in enumerate(stages):
        values_KW = stage.values().to(residual_ND)
        if isinstance(stage, OneHot):
            part_WD = kmeans(residual_ND, stage.size, seed=seed + i)
            residual_ND -= part_WD[_digits(residual_ND, part_WD, stage)]
            moment_DD = residual_ND.T @ residual_ND
        else:
            part_WD, codes_NW = _along_axes(residual_ND, moment_DD, stage, values_KW)
            # the moments of x - A U, without another pass over x
            cross_DD = residual_ND.T @ codes_NW @ part_WD
            moment_DD += part_WD.T @ (codes_NW.T @ codes_NW) @ part_WD - cross_DD - cross_DD.T
            residual_ND -= codes_NW @ part_WD
        parts.append(part_WD)
    return torch.cat(parts)


def _along_axes(x_ND: Tensor, moment_DD: Tensor, stage: Alphabet, values_KW: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [W, D] and codes [N, W] that lower |x - A U|^2, alternating from the axes of most variance."""
    axes_DW = torch.linalg.eigh(moment_DD).eigenvectors[:, -stage.width :].flip(1)
    scale_W = (x_ND @ axes_DW).square().mean(0).sqrt() / values_KW.square().mean(0).sqrt()
    part_WD = axes_DW.T * scale_W.unsqueeze(1)
    for _ in range(_ALTERNATIONS):
        codes_NW = values_KW[_digits(x_ND, part_WD, stage)]
        square_WW = codes_NW.T @ codes_NW
        part_WD = torch.linalg.solve(square_WW + _TINY * torch.eye(stage.width).to(square_WW), codes_NW.T @ x_ND)
    return part_WD, values_KW[_digits(x_ND, part_WD, stage)]


def _digits(x_ND: Tensor, part_WD: Tensor, stage: Alphabet) -> Tensor:
    return encode(x_ND, part_WD, (stage,))[:, 0].long()
