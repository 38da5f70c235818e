"""What encoding needs of a basis, computed once: the affine map from vectors to levels, and what each digit changes."""

from collections.abc import Iterable
from itertools import accumulate, chain, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sidrec_torchrec.codec.alphabet import Alphabet
from sidrec_torchrec.codec.choices import TIE, Choice
from sidrec_torchrec.ops.greedy import LARGEST, greedy

_UNIT_ROUNDOFF = 2.0**-24  # of float32


class Choices(NamedTuple):
    """The choices of a list of stages, and how their digits change the levels y [R, N].

    Args:
        stages: alphabet of each digit.
        choices: what the stages decide, S choices.
        rows: of each choice, in R.
        pull_RR: what a digit 1 (of a coordinate), or the choice (of a codeword) of column k adds to the y of rows of later
            choices.
        pull_RS: the columns of coordinates, by choice; 0 for codewords, and for rows of choices not later.
        cost_S: squared error per unit of each choice's costs.
        reach_S: how far a vector of length 1 can move each choice's y.
    """

    stages: tuple[Alphabet, ...]
    choices: tuple[Choice, ...]
    rows: tuple[slice, ...]
    pull_RR: Tensor
    pull_RS: Tensor
    cost_S: Tensor
    reach_S: list[float]

    def subtract(self, number: int, own_WN: Tensor, digits_SN: Tensor) -> Tensor:
        """Adjusts, in place, the y of choice ``number``, [W, N], to the digits of the choices before."""
        rows = self.rows[number]
        if any(choice.width == 1 for choice in self.choices[:number]):
            own_WN.addmm_(self.pull_RS[rows, :number], digits_SN)
        for choice, columns, digit_N in zip(self.choices, self.rows, digits_SN, strict=False):
            if choice.width > 1:
                own_WN += self.pull_RR[rows, columns].index_select(1, digit_N.long())
        return own_WN

    def join(self, digits_SN: Tensor) -> Tensor:
        """Digits of choices as digits of stages, [L, N]."""
        if len(self.choices) == len(self.stages):
            return digits_SN
        joined, digits = [], iter(digits_SN)
        for stage in self.stages:
            digit_N = torch.zeros_like(digits_SN[0])
            for choice in stage.choices():
                digit_N = digit_N * choice.count + next(digits)
            joined.append(digit_N)
        return torch.stack(joined)

    def weights(self, digits_SN: Tensor) -> Tensor:
        """Digits of choices as weights of the basis rows, [R, N]."""
        return torch.cat([choice.weights(digit_N) for choice, digit_N in zip(self.choices, digits_SN, strict=True)])


class Plan:
    """Levels in float64: ``y = weight (z - offset) + bias``, before any digit.

    Arguments as ``search.encode``.
    """

    def __init__(self, basis_RD: Tensor, stages: tuple[Alphabet, ...], offset_D: Tensor | float) -> None:
        basis_RD = basis_RD.double()
        choices = tuple(chain.from_iterable(stage.choices() for stage in stages))
        ends = list(accumulate(choice.width for choice in choices))
        rows = tuple(slice(end - choice.width, end) for end, choice in zip(ends, choices, strict=True))
        norm_R = basis_RD.square().sum(1)
        scales, shifts, costs, reaches, first = [], [], [], [], 0
        for choice, run in groupby(choices):
            count = len(list(run))
            last = first + count * choice.width
            norm_SW = norm_R[first:last].view(count, choice.width)
            scale_SW, shift_SW = choice.affine(norm_SW)
            scales.append(scale_SW.flatten())
            shifts.append(shift_SW.flatten())
            costs.append(choice.cost_unit(norm_SW))
            reaches.append((scale_SW.abs() * norm_SW.sqrt()).amax(1))
            first = last
        self.weight_RD = torch.cat(scales).unsqueeze(1) * basis_RD
        self.offset_D = torch.as_tensor(offset_D, dtype=torch.float64, device=basis_RD.device).expand(basis_RD.shape[1])

        def tensor(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float64, device=basis_RD.device)

        is_coordinate = [choice.width == 1 for choice in choices]
        by_row = [number for number, choice in enumerate(choices) for _ in range(choice.width)]
        unit_R1 = tensor([choices[number].unit for number in by_row]).unsqueeze(1)
        pull_RR = -(self.weight_RD @ (unit_R1 * basis_RD).T)
        later_RS = tensor(by_row).unsqueeze(1) > tensor(range(len(choices)))
        pull_RS = pull_RR[:, [slice_.start for slice_ in rows]] * tensor(is_coordinate) * later_RS
        lowest_S = tensor([choice.lowest / choice.unit for choice in choices])
        self.bias_R = torch.cat(shifts) + pull_RS @ lowest_S
        self.choices = Choices(stages, choices, rows, pull_RR, pull_RS, torch.cat(costs), torch.cat(reaches).tolist())

    def levels(self, z_ND: Tensor) -> Tensor:
        """y of float vectors [N, D]: float64 [R, N]."""
        # the offset's own products could cancel with those of the vectors: subtract it first
        return torch.addmm(self.bias_R.unsqueeze(1), self.weight_RD, (z_ND.double() - self.offset_D).T)


class Float32Plan:
    """The same levels in float32, on CPU, and a bound on how far rounding, in any order of sums, can have moved them.

    A sum of m products is off by at most m u / (1 - m u) times the sum of their sizes, u being the unit roundoff (Higham
    2002, section 3.1). The products of a vector with row r have, by Cauchy-Schwarz, a sum of sizes of at most |z| |weight_r|;
    the sizes of all else are known beforehand. So y of choice s is off by at most ``reach_s error_n``.
    """

    def __init__(self, plan: Plan) -> None:
        exact = plan.choices
        bias_R = plan.bias_R - plan.weight_RD @ plan.offset_D
        # what each column changes, column by column
        self._tensors = plan.weight_RD.float(), bias_R.float(), exact.pull_RR.float().T.contiguous()
        self._choices = exact
        self.is_usable = all(bool((tensor.abs() < LARGEST).all()) for tensor in self._tensors)

        largest_S = torch.tensor([choice.count - 1.0 for choice in exact.choices], dtype=torch.float64)
        size_R = bias_R.abs() + TIE + exact.pull_RS.abs() @ largest_S
        for choice, rows in zip(exact.choices, exact.rows, strict=True):
            if choice.width > 1:
                size_R[rows.stop :] += exact.pull_RR[rows.stop :, rows].abs().amax(1)
        widths_S = torch.tensor([choice.width for choice in exact.choices])
        reach_R = torch.tensor(exact.reach_S, dtype=torch.float64).repeat_interleave(widths_S)
        # a square below the smallest normal number may be lost from a norm
        lost = (plan.weight_RD.shape[1] * torch.finfo(torch.float32).tiny) ** 0.5
        self._size = lost + float(torch.where(reach_R > 0, size_R / reach_R, 0.0).amax())
        # and as many again for the roundings to float32 and those of the comparisons
        terms = plan.weight_RD.shape[1] + len(exact.choices) + 64
        self._unit_error = 1.01 * terms * _UNIT_ROUNDOFF / (1 - terms * _UNIT_ROUNDOFF)

    def search(self, z_ND: Tensor, error_N: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Digits by greedy search.

        Args:
            z_ND: vectors, float; taken in float32.
            error_N: float32, by how much, in length, a vector may be off the one that is meant; None for not at all.

        Returns:
            Digits, int16 [N, L], and whether they are surely those of float64, bool [N]; others may be anything.
        """
        choices = self._choices.choices
        stages = [number for number, stage in enumerate(self._choices.stages) for _ in stage.choices()]
        widths, counts = [choice.width for choice in choices], [choice.count for choice in choices]
        bounds = self._choices.reach_S, TIE, self._unit_error, self._size
        return greedy(z_ND.float(), *self._tensors, widths, counts, stages, *bounds, error_N)


def float32_is_ieee() -> bool:
    """Whether matrix products of float32 on CPU are in float32: PyTorch can be told to use fewer bits."""
    mkldnn: Any = torch.backends.mkldnn
    return all(setting in ("none", "ieee") for setting in (mkldnn.matmul.fp32_precision, mkldnn.fp32_precision))
