"""What every quantizer does: vectors to digits and back."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sidrec_torchrec.codec.alphabet import Alphabet


class QuantizerOutput(NamedTuple):
    """A quantizer's answer in training.

    Args:
        z_q_ND: float [N, dim], the decoded digits; gradients pass straight through to the input.
        digits_NL: int16 [N, L].
        loss: float scalar, what the quantizer adds to the loss.
    """

    z_q_ND: Tensor
    digits_NL: Tensor
    loss: Tensor


class Quantizer(nn.Module, ABC):
    """Encodes vectors into digits. Every quantizer here is additive: a vector is an offset plus one row per digit.

    Attributes:
        stages: alphabet of each digit, coarse to fine.
        dim: width of the vectors.
    """

    def __init__(self, stages: tuple[Alphabet, ...], dim: int) -> None:
        super().__init__()
        self.stages = stages
        self.dim = dim

    @abstractmethod
    def initialize(self, z_ND: Tensor) -> None:
        """Starts the codebooks from a sample, float [N, dim]; give every process the same one."""

    @abstractmethod
    def encode(self, z_ND: Tensor) -> Tensor:
        """Digits of each row, int16 [N, L], coarse to fine; does not depend on the other rows.

        Raises:
            ValueError: on a wrong width or a value that is not finite; names the first bad row.
        """

    @abstractmethod
    def forward(self, z_ND: Tensor) -> QuantizerOutput:
        """Encodes and decodes float [N, dim], with straight-through gradients and the quantizer's own loss."""

    @abstractmethod
    def digit_tables(self) -> list[Tensor]:
        """Per digit, what each of its values adds to the vector: float [radix_j, dim]."""

    @property
    @abstractmethod
    def offset(self) -> Tensor:
        """What every vector begins with: float [dim]."""

    def decode(self, digits_NL: Tensor, *, num_digits: int | None = None) -> Tensor:
        """Vectors of digits.

        Args:
            digits_NL: integers [N, L].
            num_digits: decode only this many first digits; None for all.

        Returns:
            float [N, dim].
        """
        tables = self.digit_tables()[:num_digits]
        z_ND = self.offset.expand(len(digits_NL), -1)
        for j, table in enumerate(tables):
            z_ND = z_ND + table[digits_NL[:, j].long()]
        return z_ND

    def _check_input(self, z_ND: Tensor) -> None:
        if z_ND.ndim != 2 or z_ND.shape[1] != self.dim:
            raise ValueError(f"vectors have shape {tuple(z_ND.shape)}, expected [N, {self.dim}]")
        finite_N = torch.isfinite(z_ND).all(dim=1)
        if not finite_N.all():
            raise ValueError(f"row {int(finite_N.long().argmin())} holds a value that is not finite")


def squared_distance(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """Mean over rows of |x - y|^2, a scalar."""
    return (x_ND - y_ND).square().sum(1).mean()
