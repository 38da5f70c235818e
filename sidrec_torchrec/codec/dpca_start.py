"""Where learning DPCA's basis starts: one stage after another, each on what those before left of a sample."""

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot
from sidrec_torchrec.codec.kmeans import kmeans
from sidrec_torchrec.codec.search import codes, encode

_ALTERNATIONS = 12  # of codes and rows, to start a stage that is not one-hot
_TINY = 1e-9


def start(x_ND: Tensor, stages: tuple[Alphabet, ...], seed: int) -> Tensor:
    """A first basis for centered vectors, float64 [R, D]: k-means for one-hot stages, principal axes for others."""
    parts, residual_ND = [], x_ND.clone()
    moment_DD = residual_ND.T @ residual_ND
    for i, stage in enumerate(stages):
        if isinstance(stage, OneHot):
            part_WD = kmeans(residual_ND, stage.size, seed=seed + i)
            residual_ND -= part_WD[encode(residual_ND, part_WD, (stage,))[:, 0].long()]
            moment_DD = residual_ND.T @ residual_ND
        else:
            part_WD, codes_NW = _along_axes(residual_ND, moment_DD, stage)
            # the moments of x - A U, without another pass over x
            cross_DD = residual_ND.T @ codes_NW @ part_WD
            moment_DD += part_WD.T @ (codes_NW.T @ codes_NW) @ part_WD - cross_DD - cross_DD.T
            residual_ND -= codes_NW @ part_WD
        parts.append(part_WD)
    return torch.cat(parts)


def _along_axes(x_ND: Tensor, moment_DD: Tensor, stage: Alphabet) -> tuple[Tensor, Tensor]:
    """Rows [W, D] and codes [N, W] that lower |x - A U|^2, alternating from the axes of most variance."""
    part_WD = torch.linalg.eigh(moment_DD).eigenvectors[:, -stage.width :].flip(1).T
    if not stage.radix:
        return part_WD, codes(x_ND, part_WD, (stage,))  # principal components: nothing can be lower
    part_WD = part_WD * (
        (x_ND @ part_WD.T).square().mean(0) / stage.values().square().mean(0).to(x_ND)
    ).sqrt().unsqueeze(1)
    for _ in range(_ALTERNATIONS):
        codes_NW = codes(x_ND, part_WD, (stage,))
        square_WW = codes_NW.T @ codes_NW
        part_WD = torch.linalg.solve(square_WW + _TINY * torch.eye(stage.width).to(square_WW), codes_NW.T @ x_ND)
    return part_WD, codes(x_ND, part_WD, (stage,))
