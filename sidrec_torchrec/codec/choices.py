"""The decisions a search takes: the level of one coordinate, or one of K codewords.

Each works on *levels* y, an affine map of the products of its basis rows with what the vector has left, scaled so that
rounding is all that remains to do: a coordinate of levels 0 .. K - 1 takes ceil(y), codewords compete for the least y. Digits are
those of exact arithmetic with one rule for ties, which are nothing rare (codewords repeat, data are integers) and would
else be broken by rounding, differently for each batch and device: what lies within ``TIE`` of a tie is one, and goes to the
lower digit.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 1e-9  # in y: of a level's distance to the next, of the largest squared codeword


class Choice(ABC):
    """One decision.

    Attributes:
        count: digits to choose from; 0: any number.
        width: basis rows it weighs.
        unit: weight of a row per digit, if ``width`` is 1.
        lowest: weight of the row at digit 0, if ``width`` is 1.
    """

    count: int
    width: int
    unit: float
    lowest: float

    @abstractmethod
    def affine(self, norm_SW: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [S, W] that make y of products, given the squared norms of the rows of S such choices."""

    @abstractmethod
    def choose(self, y_WN: Tensor, digit_N: Tensor) -> None:
        """Writes the best digit of each column to ``digit_N``, of y's type. May change y."""

    @abstractmethod
    def weights(self, digit_N: Tensor) -> Tensor:
        """Weights of the basis rows, [W, N]."""

    @abstractmethod
    def costs(self, y_WN: Tensor) -> Tensor:
        """What each digit adds to the squared error, [count, N], in units of ``cost_unit``."""

    @abstractmethod
    def cost_unit(self, norm_SW: Tensor) -> Tensor:
        """What 1 of ``costs`` is in squared error, [S]."""


@dataclass(frozen=True)
class Coordinate(Choice):
    """The weight of one basis row: ``lowest + unit * digit``, nearest to z / |u|^2 for the product z."""

    count: int
    unit: float
    lowest: float
    width = 1

    def affine(self, norm_SW: Tensor) -> tuple[Tensor, Tensor]:
        # a row of zeros has nothing to weigh: y is the middle
        scale_SW = torch.where(norm_SW > 0, 1 / (self.unit * norm_SW), 0.0)
        shift = self.count / 2 - 1 - TIE if self.count else 0.0
        return scale_SW, torch.full_like(scale_SW, shift)

    def choose(self, y_WN: Tensor, digit_N: Tensor) -> None:
        if self.count:
            torch.ceil(y_WN[0].clamp_(-0.5, self.count - 1.5), out=digit_N)
        else:
            digit_N.copy_(y_WN[0])

    def weights(self, digit_N: Tensor) -> Tensor:
        return (self.lowest + self.unit * digit_N).unsqueeze(0)

    def costs(self, y_WN: Tensor) -> Tensor:
        # of digit j where f = y + 1/2 were best: (j - f)^2, less that of no weight at all
        j_K1 = torch.arange(self.count).to(y_WN).unsqueeze(1)
        middle = (self.count - 1) / 2
        return (j_K1 - middle) * (j_K1 + (middle - 1) - 2 * y_WN)

    def cost_unit(self, norm_SW: Tensor) -> Tensor:
        return self.unit**2 * norm_SW[:, 0]


@dataclass(frozen=True)
class Codewords(Choice):
    """One of ``count`` basis rows: the nearest, whose |u|^2 - 2 z is least."""

    count: int
    unit = 1.0
    lowest = 0.0

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.count

    def affine(self, norm_SW: Tensor) -> tuple[Tensor, Tensor]:
        largest_S1 = norm_SW.amax(1, keepdim=True)
        inverse_S1 = torch.where(largest_S1 > 0, 1 / largest_S1, 0.0)
        return (-2 * inverse_S1).expand_as(norm_SW), norm_SW * inverse_S1

    def choose(self, y_WN: Tensor, digit_N: Tensor) -> None:
        digit_N.copy_((y_WN <= y_WN.amin(0) + TIE).byte().argmax(0))

    def weights(self, digit_N: Tensor) -> Tensor:
        rows_K1 = torch.arange(self.count, device=digit_N.device).unsqueeze(1)
        return (rows_K1 == digit_N).to(digit_N)

    def costs(self, y_WN: Tensor) -> Tensor:
        return y_WN

    def cost_unit(self, norm_SW: Tensor) -> Tensor:
        return norm_SW.amax(1)
