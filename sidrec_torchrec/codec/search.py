"""Encoding against a basis: from products with the basis and its Gram matrix alone, never from decoded vectors.

A vector is near the sum of the basis rows its digits choose. With Z = z U^T and G = U U^T, choosing row r with weight a
changes the squared error by a^2 G_rr - 2 a Z_r, and leaves the residual's products Z - a G_r. So a choice costs O(R) per
row whatever the width of the vectors, and the whole encoding O(N R (D + L)). Products lie in memory row of the basis by row
of the basis, [R, N], so that a choice runs over contiguous numbers.

An item's digits must not depend on its batch, process or device. In float32 they would: some product of a large corpus
always lies at a threshold, and how rows are batched moves its last bits. In float64 only true ties do, and those go to the
lower digit. So float64 decides, but float32 filters: on CPU, greedy search runs in float32 with a bound on all rounding
errors, and only vectors with a decision within the bound, about one in a hundred, are encoded again in float64. The digits
are those of float64 throughout. A vector that is not finite has an infinite bound, so whoever encodes in float64 is the one
to refuse it, without a pass over all others. A beam compares sums over all choices, and few of those differ by more than the
bound: it runs in float64.

The float32 search is an operator of its own (``ops/greedy.py``), which in C++ reads every vector once.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet
from sidrec_torchrec.codec.choices import TIE
from sidrec_torchrec.codec.plan import Choices, Float32Plan, Plan, float32_is_ieee
from sidrec_torchrec.codec.quantizer import check_finite
from sidrec_torchrec.native import build

_BLOCK_NUMBERS = 1 << 23  # held at a time, per array
_THREAD_ROWS = 1 << 15  # below, PyTorch leaves a choice to a single thread
_EXACT_ROWS = 1 << 13  # of float64 copies
_FILTER_ROWS = 1 << 10  # for fewer, a plan in float32 costs more than it saves


class Search:
    """Encoding against a basis, with all that can be computed once; see the module.

    Args:
        basis_RD: float [R, D], stage after stage: the codewords of a one-hot stage, one row a coordinate of any other.
        stages: alphabet of each digit.
        offset_D: float [D], what every vector begins with.
        beam: candidates kept after each choice; 1 is greedy. Cost grows linearly.

    Raises:
        ValueError: on a real stage, which has no digits.
    """

    def __init__(
        self,
        basis_RD: Tensor,
        stages: tuple[Alphabet, ...],
        *,
        offset_D: Tensor | float = 0.0,
        beam: int = 1,
    ) -> None:
        for stage in stages:
            if not stage.radix:
                raise ValueError(f"a '{stage}' stage has no digits: ask for codes, or name another alphabet")
        self._stages = stages
        self._beam = beam
        self._plan = Plan(basis_RD, stages, offset_D)
        self._on_cpu = basis_RD.device.type == "cpu"

    @cached_property
    def _fast(self) -> Float32Plan:
        return Float32Plan(self._plan)

    @property
    def has_filter(self) -> bool:
        """Whether ``filtered`` decides most vectors, and is right: a greedy search on CPU."""
        if self._beam > 1 or not self._on_cpu or not (build.is_available() or float32_is_ieee()):
            return False
        return self._fast.is_usable

    def filtered(self, z_ND: Tensor, error_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Digits in float32, int16 [N, L], and where they are surely those of float64, bool [N]. See ``has_filter``.

        Args:
            z_ND: float [N, D].
            error_N: float32, by how much, in length, a vector may be off the one that is meant; None for not at all.
        """
        return self._fast.search(z_ND, error_N)

    def encode(self, z_ND: Tensor, *, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """Digits of vectors, in bounded memory.

        Args:
            z_ND: float [N, D].
            rows: their numbers, for messages; None for 0, 1, ...

        Returns:
            int16 [N, L].

        Raises:
            ValueError: on a vector that is not finite; names its row.

        Source: greedy coding as in residual quantization; beam search as in Babenko & Lempitsky 2014, section 3.
        """
        rows = range(len(z_ND)) if rows is None else rows
        digits_NL = torch.empty(len(z_ND), len(self._stages), dtype=torch.int16, device=z_ND.device)
        fast = len(z_ND) >= _FILTER_ROWS and z_ND.device.type == "cpu" and self.has_filter
        count = _rows_at_once(self._plan.choices, self._beam)
        for first in range(0, len(z_ND), count):
            block = slice(first, first + count)
            if not fast:
                _encode_exactly(self._plan, z_ND[block], self._beam, digits_NL[block], rows[block])
                continue
            digits_NL[block], sure_N = self.filtered(z_ND[block])
            unsure_M = first + (~sure_N).nonzero().squeeze(1)
            exact_ML = torch.empty(len(unsure_M), len(self._stages), dtype=torch.int16)
            numbers = rows[unsure_M] if isinstance(rows, Tensor) else [rows[i] for i in unsure_M.tolist()]
            _encode_exactly(self._plan, z_ND[unsure_M], self._beam, exact_ML, numbers)
            digits_NL[unsure_M] = exact_ML
        return digits_NL


def encode(
    z_ND: Tensor,
    basis_RD: Tensor,
    stages: tuple[Alphabet, ...],
    *,
    offset_D: Tensor | float = 0.0,
    beam: int = 1,
) -> Tensor:
    """Digits of vectors, int16 [N, L]; arguments and errors as those of ``Search``."""
    return Search(basis_RD, stages, offset_D=offset_D, beam=beam).encode(z_ND)


def codes(
    z_ND: Tensor,
    basis_RD: Tensor,
    stages: tuple[Alphabet, ...],
    *,
    offset_D: Tensor | float = 0.0,
    beam: int = 1,
) -> Tensor:
    """What vectors weigh the basis rows with: float64 [N, R]. Arguments as ``encode``; a real stage's weights are numbers.

    Raises:
        ValueError: on a beam over a real stage, or a vector that is not finite.
    """
    if all(stage.radix for stage in stages):
        return weights(encode(z_ND, basis_RD, stages, offset_D=offset_D, beam=beam), stages)
    if beam > 1:
        raise ValueError("a beam keeps several digits of each stage, and a real stage has none")
    plan = Plan(basis_RD, stages, offset_D)
    check_finite(z_ND, range(len(z_ND)))
    rows = min(_EXACT_ROWS, _rows_at_once(plan.choices, beam))
    return torch.cat([plan.choices.weights(_search(plan.choices, plan.levels(x), beam)).T for x in z_ND.split(rows)])


def weights(digits_NL: Tensor, stages: tuple[Alphabet, ...]) -> Tensor:
    """Digits as weights of the basis rows, float64 [N, R]."""
    values = [stage.values().to(digits_NL.device, torch.float64) for stage in stages]
    return torch.cat([value[digits_NL[:, j].long()] for j, value in enumerate(values)], dim=1)


def _rows_at_once(choices: Choices, beam: int) -> int:
    largest = max(choice.count for choice in choices.choices)
    numbers = len(choices.pull_RR) if beam == 1 else beam * (len(choices.choices) + 2 * largest)
    return max(1, min(_THREAD_ROWS * torch.get_num_threads(), _BLOCK_NUMBERS // numbers))


def _encode_exactly(plan: Plan, z_ND: Tensor, beam: int, out_NL: Tensor, rows: Sequence[int] | Tensor) -> None:
    """Digits by float64, into ``out_NL``. Refuses vectors that are not finite by their numbers, ``rows``."""
    check_finite(z_ND, rows)
    for block_ND, block_NL in zip(z_ND.split(_EXACT_ROWS), out_NL.split(_EXACT_ROWS), strict=True):
        digits_SN = _search(plan.choices, plan.levels(block_ND), beam)
        block_NL.copy_(plan.choices.join(digits_SN).T)


def _search(choices: Choices, y_RN: Tensor, beam: int) -> Tensor:
    """Digits of choices, [S, N], as y's type. Uses up y_RN."""
    return _greedy(choices, y_RN) if beam == 1 else _beam(choices, y_RN, beam)


def _greedy(choices: Choices, y_RN: Tensor) -> Tensor:
    """Each choice takes what lowers the error most; digits of choices, [S, N]."""
    digits_SN = y_RN.new_empty(len(choices.choices), y_RN.shape[1])
    for number, (choice, rows) in enumerate(zip(choices.choices, choices.rows, strict=True)):
        own_WN = choices.subtract(number, y_RN[rows], digits_SN[:number])
        choice.choose(own_WN, digits_SN[number])
    return digits_SN


def _beam(choices: Choices, y_RN: Tensor, beam: int) -> Tensor:
    """Each choice extends every kept candidate by every digit, and keeps the ``beam`` of least error."""
    count = y_RN.shape[1]
    first_N1 = torch.arange(count, device=y_RN.device).unsqueeze(1)
    cost_NB = y_RN.new_zeros(count, 1)
    digits_SC = y_RN.new_empty(0, count)  # columns: the candidates of the first vector, of the second, ...
    tie = TIE * choices.cost_S.amax()
    for number, (choice, rows) in enumerate(zip(choices.choices, choices.rows, strict=True)):
        kept = cost_NB.shape[1]
        own_WC = choices.subtract(number, y_RN[rows].repeat_interleave(kept, dim=1), digits_SC)
        step_KNB = (choice.costs(own_WC) * choices.cost_S[number]).unflatten(1, (count, kept))
        total_NX = (cost_NB + step_KNB).permute(1, 2, 0).flatten(1)
        index_NB = _least(total_NX, beam, tie)
        cost_NB = total_NX.gather(1, index_NB)
        parent_C = (first_N1 * kept + index_NB // choice.count).flatten()
        digit_C = (index_NB % choice.count).flatten().to(y_RN)
        digits_SC = torch.cat([digits_SC.index_select(1, parent_C), digit_C.unsqueeze(0)])
    best_N1 = _least(cost_NB, 1, tie)
    return digits_SC.index_select(1, (first_N1 * cost_NB.shape[1] + best_N1).squeeze(1))


def _least(total_NX: Tensor, count: int, tie: Tensor) -> Tensor:
    """The ``count`` least of each row, the first of those that tie, as indices [N, count] in order.

    Candidates stand in the order of their digits and stay so: whole SIDs that tie, too, go to the lower digits.
    """
    if total_NX.shape[1] <= count:
        return torch.arange(total_NX.shape[1], device=total_NX.device).expand(len(total_NX), -1)
    bar_N1 = total_NX.topk(count, largest=False, sorted=False).values.amax(1, keepdim=True)
    slack_N1 = tie + TIE * bar_N1.abs()
    below_NX = total_NX < bar_N1 - slack_N1
    tied_NX = (total_NX <= bar_N1 + slack_N1) ^ below_NX
    chosen_NX = below_NX | (tied_NX & (tied_NX.cumsum(1) <= count - below_NX.sum(1, keepdim=True)))
    return chosen_NX.nonzero()[:, 1].view(len(total_NX), count)
