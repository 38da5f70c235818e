"""Encoding against a basis: from products with the basis and its Gram matrix alone, never from decoded vectors.

A vector is near the sum of the basis rows its digits choose. With Z = z U^T and G = U U^T, choosing row r with weight a
changes the squared error by a^2 G_rr - 2 a Z_r, and leaves the residual's products Z - a G_r. So a stage costs O(R) per
row whatever the width of the vectors, and the whole encoding O(N R (D + L)).

Everything is computed in float64. In float32 the products depend on how rows are batched in their last bits, and some
digit of a large corpus turns with them; in float64 this takes a tie to 16 digits.
"""

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet, Ternary

_BLOCK_NUMBERS = 1 << 22  # products held at a time: 32 MiB


def encode(
    z_ND: Tensor,
    basis_RD: Tensor,
    stages: tuple[Alphabet, ...],
    *,
    offset_D: Tensor | float = 0.0,
    beam: int = 1,
) -> Tensor:
    """Digits of vectors, in bounded memory.

    Args:
        z_ND: float [N, D].
        basis_RD: float [R, D], stage after stage: the one row of a ternary stage, the codewords of a one-hot one.
        stages: alphabet of each digit.
        offset_D: float [D], what every vector begins with.
        beam: candidates kept after each stage; 1 is greedy. Cost grows linearly.

    Returns:
        int16 [N, L].

    Source: greedy coding as in residual quantization; beam search as in Babenko & Lempitsky 2014, section 3.
    """
    basis_RD = basis_RD.double()
    gram_RR = basis_RD @ basis_RD.T
    block = max(1, _BLOCK_NUMBERS // (beam * len(basis_RD)))
    digits = []
    for block_ND in z_ND.split(block):
        z_NR = (block_ND.double() - offset_D) @ basis_RD.T
        digits.append(_greedy(z_NR, gram_RR, stages) if beam == 1 else _beam(z_NR, gram_RR, stages, beam))
    return torch.cat(digits)


def nearest(product_NK: Tensor, norm_K: Tensor) -> Tensor:
    """The codeword nearest to each row, the first of those equally near.

    Codewords can repeat (there were fewer distinct vectors than codewords). Their distances then differ by rounding
    alone, which changes with the batch and the device: a plain argmin would make the digit depend on them.

    Args:
        product_NK: float64, rows times codewords.
        norm_K: float64, squared norms of the codewords.

    Returns:
        int64 [N].
    """
    distance_NK = norm_K - 2 * product_NK  # less the row's own norm
    least_N1 = distance_NK.amin(1, keepdim=True)
    slack_N1 = 1e-12 * (norm_K.amax() + least_N1.abs())
    return (distance_NK <= least_N1 + slack_N1).byte().argmax(1)


def _greedy(z_NR: Tensor, gram_RR: Tensor, stages: tuple[Alphabet, ...]) -> Tensor:
    """Each stage takes what lowers the error most. Uses up z_NR."""
    digits, first = [], 0
    norm_R = gram_RR.diagonal()
    for stage in stages:
        last = first + stage.width
        if isinstance(stage, Ternary):
            # round(z / |u|^2) to -1, 0, 1; written as comparisons, so that a zero row gives 0
            twice_N = 2 * z_NR[:, first]
            code_N = (twice_N > norm_R[first]).to(z_NR) - (twice_N < -norm_R[first]).to(z_NR)
            z_NR[:, last:].addr_(code_N, gram_RR[first, last:], alpha=-1)
            digits.append(code_N + 1)
        else:
            digit_N = nearest(z_NR[:, first:last], norm_R[first:last])
            z_NR[:, last:] -= gram_RR[first:last, last:][digit_N]
            digits.append(digit_N)
        first = last
    return torch.stack([digit_N.to(torch.int16) for digit_N in digits], dim=1)


def _beam(z_NR: Tensor, gram_RR: Tensor, stages: tuple[Alphabet, ...], beam: int) -> Tensor:
    """Each stage extends every kept candidate by every value, and keeps the ``beam`` of least error."""
    z_NBR = z_NR.unsqueeze(1)
    cost_NB = z_NR.new_zeros(len(z_NR), 1)
    digits_NBL = torch.empty(len(z_NR), 1, 0, dtype=torch.int16, device=z_NR.device)
    first = 0
    for stage in stages:
        values_KW = stage.values().to(z_NR)
        last = first + stage.width
        own_NBW, z_NBR = z_NBR.split([stage.width, z_NBR.shape[2] - stage.width], dim=2)
        if isinstance(stage, Ternary):
            step_NBK = gram_RR[first, first] * values_KW[:, 0].square() - 2 * own_NBW * values_KW[:, 0]
        else:
            step_NBK = gram_RR.diagonal()[first:last] - 2 * own_NBW
        total_NC = (cost_NB.unsqueeze(2) + step_NBK).flatten(1)
        cost_NB, choice_NB = total_NC.topk(min(beam, total_NC.shape[1]), dim=1, largest=False)
        parent_NB, digit_NB = choice_NB // stage.radix, choice_NB % stage.radix
        taken_KR = values_KW @ gram_RR[first:last, last:]
        z_NBR = _pick(z_NBR, parent_NB) - taken_KR[digit_NB]
        digits_NBL = torch.cat([_pick(digits_NBL, parent_NB), digit_NB.unsqueeze(2).to(torch.int16)], dim=2)
        first = last
    return digits_NBL[:, 0]  # topk sorts: the first is the best


def _pick(x_NBR: Tensor, parent_NB: Tensor) -> Tensor:
    return x_NBR.gather(1, parent_NB.unsqueeze(2).expand(-1, -1, x_NBR.shape[2]))
