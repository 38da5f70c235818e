"""How long a source's vectors are: a few that are far longer than the rest make up its variance, and hide the rest."""

from dataclasses import dataclass

from torch import Tensor

# Root mean square over mean length: 1 if all are alike, 1.6 if their logarithms spread by 1. docs/vq_fusion.md has what
# becomes of the others beyond it.
_MOST = 2.0


@dataclass
class Lengths:
    """Lengths of the vectors seen so far.

    Args:
        count: vectors.
        total: sum of their lengths.
        squares: and of their squares.
        longest: the greatest length.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    longest: float = 0.0

    def update(self, x_ND: Tensor) -> None:
        """Takes vectors, float64 [N, d]."""
        if not len(x_ND):
            return
        length_N = x_ND.square().sum(1).sqrt()
        self.count += len(x_ND)
        self.total += float(length_N.sum())
        self.squares += float(length_N.square().sum())
        self.longest = max(self.longest, float(length_N.max()))

    @property
    def are_uneven(self) -> bool:
        """Whether few vectors make up most of the sum of squares."""
        return self.squares * self.count > (_MOST * self.total) ** 2
