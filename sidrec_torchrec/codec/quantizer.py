"""What every quantizer does: vectors to digits and back."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from sidrec_torchrec.codec.alphabet import Alphabet
from sidrec_torchrec.registry import Registry

if TYPE_CHECKING:
    from sidrec_torchrec.codec.search import Search


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

    Registered by name in ``QUANTIZERS``, it can be VQ Fusion's.

    Attributes:
        stages: alphabet of each digit, coarse to fine.
        dim: width of the vectors.
    """

    def __init__(self, stages: tuple[Alphabet, ...], dim: int) -> None:
        super().__init__()
        self.stages = stages
        self.dim = dim
        self._is_frozen = False

    def freeze(self) -> None:
        """Keeps all that decodes as it is, whatever trains the vectors from here on."""
        self._is_frozen = True
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "Quantizer":
        """As every module; a frozen one stays in evaluation, where no codeword moves."""
        return super().train(mode and not self._is_frozen)

    @classmethod
    def check_stages(cls, stages: tuple[Alphabet, ...]) -> None:
        """Refuses stages it cannot have; by default it can have any.

        Raises:
            ValueError: on such stages; says which it takes.
        """

    @classmethod
    @abstractmethod
    def build(cls, dim: int, stages: tuple[Alphabet, ...], *, commitment: float) -> "Quantizer":
        """An untrained quantizer.

        Args:
            dim: width of the vectors.
            stages: alphabet of each digit, coarse to fine; ``check_stages`` has let them pass.
            commitment: weight, in training, of the pull of vectors towards their decoded digits.
        """

    @abstractmethod
    def initialize(self, z_ND: Tensor) -> None:
        """Starts the codebooks from a sample, float [N, dim]; give every process the same one.

        Raises:
            ValueError: as ``encode``, and on a sample without rows.
        """

    @abstractmethod
    def encode(self, z_ND: Tensor) -> Tensor:
        """Digits of each row, int16 [N, L], coarse to fine; does not depend on the other rows.

        Raises:
            ValueError: on a wrong width or a value that is not finite; names the first bad row.
        """

    def search(self) -> "Search | None":
        """``encode`` with all computed once that depends on the weights as they are; None if it is no search of a basis."""
        return None

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

        Raises:
            ValueError: on another number of digits, or a ``num_digits`` outside 0 to L.
            IndexError: on a digit out of range.
        """
        return add_tables(self.offset, self.digit_tables(), digits_NL, num_digits)


QUANTIZERS: Registry[type[Quantizer]] = Registry("quantizer")


def add_tables(
    offset_D: Tensor, digit_tables: Sequence[Tensor], digits_NL: Tensor, num_digits: int | None = None
) -> Tensor:
    """``offset + sum_j digit_tables[j][digit_j]`` over the first ``num_digits`` digits, float [N, D]; see ``decode``."""
    if digits_NL.ndim != 2 or digits_NL.shape[1] != len(digit_tables):
        raise ValueError(f"digits have shape {tuple(digits_NL.shape)}, expected [N, {len(digit_tables)}]")
    if num_digits is not None and not 0 <= num_digits <= len(digit_tables):
        raise ValueError(f"num_digits is {num_digits}, expected 0 to {len(digit_tables)}")
    z_ND = offset_D.repeat(len(digits_NL), 1)
    for j, table in enumerate(digit_tables[:num_digits]):
        z_ND = z_ND + embedding(digits_NL[:, j].long(), table)  # indexing would take digit -1 for the last
    return z_ND


def check_width(z_ND: Tensor, dim: int) -> None:
    """Refuses vectors of another shape than [N, dim], with a ValueError."""
    if z_ND.ndim != 2 or z_ND.shape[1] != dim:
        raise ValueError(f"vectors have shape {tuple(z_ND.shape)}, expected [N, {dim}]")


def check_finite(z_ND: Tensor, rows: Sequence[int] | Tensor) -> None:
    """Refuses what cannot be encoded.

    Args:
        z_ND: float [N, D].
        rows: number of each row, for the message.

    Raises:
        ValueError: on a value that is not finite; names the first bad row.
    """
    if torch.isfinite(z_ND.sum()):  # one pass, without an array of bools; a sum that is not may only have overflowed
        return
    finite_N = torch.isfinite(z_ND).all(dim=1)
    if not finite_N.all():
        raise ValueError(f"row {int(rows[int(finite_N.long().argmin())])} holds a value that is not finite")


def squared_distance(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """Mean over rows of |x - y|^2, a scalar; 0 without rows, which a process may lack in a job's last batch."""
    return (x_ND - y_ND).square().sum() / max(len(x_ND), 1)
