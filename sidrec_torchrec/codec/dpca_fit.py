"""Learning DPCA's basis in closed form: encode, then solve for all basis rows jointly, and again.

With codes A [N, R] held fixed, the best basis solves (A^T A) U = A^T X: that is all a round needs of the data, so vectors
are read in chunks, on any number of processes, and only R^2 + R D sums are kept. The same alternation as the codebook
update of additive quantization (Babenko & Lempitsky 2014) and LSQ (Martinez et al. 2016).
"""

from collections.abc import Iterable
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, OneHot
from sidrec_torchrec.codec.kmeans import kmeans
from sidrec_torchrec.codec.processes import copy_from_first_process, is_first_process, sum_over_processes
from sidrec_torchrec.codec.quantizer import check_vectors
from sidrec_torchrec.codec.search import encode

_SAMPLE_ROWS = 1 << 14  # of process 0, from which the basis is started
_BLOCK_ROWS = 1 << 13
_POWER_STEPS = 12  # alternations that start one ternary row
_LEAST_CHANGE = 1e-5  # a round that changes the error by no more than this share is the last
_TINY = 1e-30
_WEIGHTS = (1e-6, 1e6)  # bounds of the ridge: rows nothing uses need some, and no row needs more


class Fitted(NamedTuple):
    """What ``fit`` learned.

    Args:
        mean_D: float64 [D].
        basis_RD: float64 [R, D].
        errors: relative squared error of the start and after each round; the basis is that of the least.
    """

    mean_D: Tensor
    basis_RD: Tensor
    errors: list[float]


def fit(
    chunks: Iterable[Tensor],
    stages: tuple[Alphabet, ...],
    dim: int,
    *,
    rounds: int,
    ridge: float,
    beam: int,
    seed: int,
    device: torch.device,
) -> Fitted:
    """See ``DPCA.fit``."""
    mean_D, total, sample = _survey(chunks, dim, device)
    basis_RD = torch.zeros(sum(stage.width for stage in stages), dim, dtype=torch.float64, device=device)
    if is_first_process():
        basis_RD = _start(torch.cat(sample) - mean_D, stages, seed)
    copy_from_first_process(basis_RD)
    best_RD, errors = basis_RD, []
    for round_ in range(rounds + 1):
        gram_RR, cross_RD = _sums(chunks, mean_D, basis_RD, stages, beam)
        # |X - A U|^2 = |X|^2 - 2 <A^T X, U> + <U, A^T A U>
        left = max(0.0, total + float((basis_RD * (gram_RR @ basis_RD - 2 * cross_RD)).sum()))
        error = left / max(total, _TINY)
        errors.append(error)
        if error == min(errors):
            best_RD = basis_RD
        if round_ == rounds or (round_ and abs(errors[-2] - error) <= _LEAST_CHANGE * error):
            break
        basis_RD = _ridge(gram_RR, cross_RD, basis_RD, left, stages, ridge)
        basis_RD = _by_energy(basis_RD, gram_RR.diagonal(), stages)
    return Fitted(mean_D, best_RD, errors)


def _blocks(chunks: Iterable[Tensor], device: torch.device) -> Iterable[Tensor]:
    for chunk_ND in chunks:
        for block_ND in chunk_ND.split(_BLOCK_ROWS):
            yield block_ND.to(device, torch.float64)


def _survey(chunks: Iterable[Tensor], dim: int, device: torch.device) -> tuple[Tensor, float, list[Tensor]]:
    """Mean [D] and total squared deviation over all processes; and this process's first rows."""
    sum_D = torch.zeros(dim, dtype=torch.float64, device=device)
    rows, sample = 0, []
    for block_ND in _blocks(chunks, device):
        check_vectors(block_ND, dim, first_row=rows)
        sample.append(block_ND[: max(0, _SAMPLE_ROWS - rows)])
        rows += len(block_ND)
        sum_D += block_ND.sum(0)
    first_rows = torch.tensor([rows], device=device)
    copy_from_first_process(first_rows)
    if not first_rows:
        raise ValueError("fit needs vectors, and process 0 was given none")
    count = torch.tensor([rows], device=device)
    sum_over_processes(count, sum_D)
    mean_D = (sum_D / count).float().double()  # as it is kept, so that the basis is learned on what will be encoded
    # a pass of its own: |x|^2 - |mean|^2 would cancel where the mean is large
    square = torch.zeros(1, dtype=torch.float64, device=device)
    for block_ND in _blocks(chunks, device):
        square += (block_ND - mean_D).square().sum()
    sum_over_processes(square)
    return mean_D, float(square), sample


def _sums(
    chunks: Iterable[Tensor], mean_D: Tensor, basis_RD: Tensor, stages: tuple[Alphabet, ...], beam: int
) -> tuple[Tensor, Tensor]:
    """A^T A and A^T X of the codes that ``basis_RD`` gives, over all processes."""
    gram_RR = basis_RD.new_zeros(len(basis_RD), len(basis_RD))
    cross_RD = torch.zeros_like(basis_RD)
    for block_ND in _blocks(chunks, basis_RD.device):
        x_ND = block_ND - mean_D
        digits_NL = encode(x_ND, basis_RD, stages, beam=beam).long()
        gram_RR += _codes_times(digits_NL, stages, _codes(digits_NL, stages))
        cross_RD += _codes_times(digits_NL, stages, x_ND)
    sum_over_processes(gram_RR, cross_RD)
    return gram_RR, cross_RD


def _codes(digits_NL: Tensor, stages: tuple[Alphabet, ...]) -> Tensor:
    """A: digits as the weights of the basis rows, float64 [N, R]."""
    values = [stage.values().to(digits_NL.device, torch.float64) for stage in stages]
    return torch.cat([value[digits_NL[:, j]] for j, value in enumerate(values)], dim=1)


def _codes_times(digits_NL: Tensor, stages: tuple[Alphabet, ...], y_NM: Tensor) -> Tensor:
    """A^T Y, [R, M]; a one-hot stage costs N M, not N K M."""
    parts, first = [], 0
    for one_hot, run in groupby(stages, key=lambda stage: isinstance(stage, OneHot)):
        alphabets = tuple(run)
        digits_NJ = digits_NL[:, first : first + len(alphabets)]
        if one_hot:
            sizes = [alphabet.size for alphabet in alphabets]
            parts += [
                y_NM.new_zeros(K, y_NM.shape[1]).index_add_(0, d, y_NM) for K, d in zip(sizes, digits_NJ.T, strict=True)
            ]
        else:
            parts.append(_codes(digits_NJ, alphabets).T @ y_NM)
        first += len(alphabets)
    return torch.cat(parts)


def _ridge(
    gram_RR: Tensor, cross_RD: Tensor, previous_RD: Tensor, left: float, stages: tuple[Alphabet, ...], ridge: float
) -> Tensor:
    """argmin_U |X - A U|^2 + sum_r weight_r |U_r|^2, where weight_r = ridge * left / energy of the row's stage.

    With ridge 1 this is the posterior mean of rows whose prior has the energy their stage showed, under noise of the
    energy left (James & Stein 1961): a codeword few vectors use, of a stage that explains little, is mostly noise.
    """
    energy_R = gram_RR.diagonal() * previous_RD.square().sum(1)
    weights = []
    for part in energy_R.split([stage.width for stage in stages]):
        weights.append((ridge * left / part.sum().clamp_min(_TINY)).clamp(*_WEIGHTS).expand(len(part)))
    return torch.linalg.solve(gram_RR + torch.cat(weights).diag(), cross_RD)


def _by_energy(basis_RD: Tensor, squares_R: Tensor, stages: tuple[Alphabet, ...]) -> Tensor:
    """Orders neighbouring stages of one alphabet by the energy they carry, so that every prefix decodes well."""
    energy_R = squares_R * basis_RD.square().sum(1)
    parts, first = [], 0
    for alphabet, run in groupby(stages):
        last = first + alphabet.width * len(list(run))
        stage_energy = energy_R[first:last].view(-1, alphabet.width).sum(1)
        rows = basis_RD[first:last].view(-1, alphabet.width, basis_RD.shape[1])
        parts.append(rows[stage_energy.argsort(descending=True, stable=True)].flatten(0, 1))
        first = last
    return torch.cat(parts)


def _start(x_ND: Tensor, stages: tuple[Alphabet, ...], seed: int) -> Tensor:
    """One stage after another on the residual of those before, float64 [R, D]."""
    rows, residual_ND = [], x_ND.clone()
    moment_DD = residual_ND.T @ residual_ND
    for i, stage in enumerate(stages):
        if isinstance(stage, OneHot):
            part_KD = kmeans(residual_ND, stage.size, seed=seed + i)
            residual_ND -= part_KD[encode(residual_ND, part_KD, (stage,))[:, 0].long()]
            moment_DD = residual_ND.T @ residual_ND
        else:
            u_D, code_N = _ternary_row(residual_ND, moment_DD)
            part_KD = u_D.unsqueeze(0)
            # the moments of x - a u, without another pass over x
            along_D = residual_ND.T @ code_N
            moment_DD += code_N.square().sum() * torch.outer(u_D, u_D)
            moment_DD -= torch.outer(along_D, u_D) + torch.outer(u_D, along_D)
            residual_ND -= torch.outer(code_N, u_D)
        rows.append(part_KD)
    return torch.cat(rows)


def _ternary_row(x_ND: Tensor, moment_DD: Tensor) -> tuple[Tensor, Tensor]:
    """A row u [D] and codes a [N] that lower |x - a u|^2, alternating from the direction of most variance."""
    direction_D = torch.linalg.eigh(moment_DD).eigenvectors[:, -1]
    u_D = direction_D * (x_ND @ direction_D).abs().mean() * 1.5
    for _ in range(_POWER_STEPS):
        code_N = _ternary_codes(x_ND, u_D)
        count = code_N.square().sum()
        if not count:
            break
        u_D = code_N @ x_ND / count
    return u_D, _ternary_codes(x_ND, u_D)


def _ternary_codes(x_ND: Tensor, u_D: Tensor) -> Tensor:
    twice_N, norm = 2 * (x_ND @ u_D), u_D.square().sum()
    return (twice_N > norm).to(x_ND) - (twice_N < -norm).to(x_ND)
