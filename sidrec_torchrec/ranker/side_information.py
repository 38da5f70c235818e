"""What is known of an event besides its item and time, in some kinds of buckets; each bucket has a row of a table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SideInformation:
    """C kinds of side information. Tables have the rows of all kinds, one kind after another.

    Args:
        sizes: number of buckets by kind; the first is the action.
    """

    sizes: dict[str, int]

    @staticmethod
    def of(num_actions: int, features: Mapping[str, int] | None = None) -> "SideInformation":
        """Of events with features, of which each has so many codes."""
        return SideInformation({"action": num_actions} | {f"feature {k}": size for k, size in (features or {}).items()})

    @property
    def num_rows(self) -> int:
        """Rows of a table."""
        return sum(self.sizes.values())

    def embed(self, side_C: Tensor, table_UD: Tensor) -> Tensor:
        """Each event's rows of a table, summed: float [..., D].

        Args:
            side_C: int64 [..., C], a bucket of each kind.
            table_UD: float; rows after ``num_rows`` are not read.

        Raises:
            ValueError: on another number of kinds.
        """
        if side_C.shape[-1] != len(self.sizes):
            raise ValueError(f"side information of {', '.join(self.sizes)} expected; got {side_C.shape[-1]} kinds")
        if len(self.sizes) == 1:
            return F.embedding(side_C.squeeze(-1), table_UD)
        sizes_C = torch.tensor(list(self.sizes.values()), device=side_C.device)
        return F.embedding(side_C + (sizes_C.cumsum(0) - sizes_C), table_UD).sum(-2)

    @torch.no_grad()
    def start(self, table_UD: Tensor) -> None:
        """Zeroes the rows of features in a new table: a code says nothing until training has it, so one that never comes never does."""
        action = next(iter(self.sizes.values()))
        table_UD[action : self.num_rows] = 0
