"""Rows of jagged entries as padded blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Where the entries of B rows stand in a block of T columns, right-aligned: the newest is in the last.

    Args:
        place_BT: int64, place of each column's entry in the jagged order; 0 in padding.
        is_entry_BT: False in padding.
    """

    place_BT: Tensor
    is_entry_BT: Tensor

    @staticmethod
    def of(lengths_B: Tensor) -> "RowLayout":
        """The layout of rows with these lengths, int64 [B]."""
        from_end_T = torch.arange(int(lengths_B.max()), 0, -1, device=lengths_B.device)
        is_entry_BT = from_end_T <= lengths_B.unsqueeze(1)
        place_BT = torch.where(is_entry_BT, lengths_B.cumsum(0).unsqueeze(1) - from_end_T, 0)
        return RowLayout(place_BT, is_entry_BT)

    def pad(self, values_N: Tensor) -> Tensor:
        """[N, ...] entries as [B, T, ...], zero in padding."""
        keep_BT = self.is_entry_BT.view(*self.is_entry_BT.shape, *[1] * (values_N.ndim - 1))
        return values_N[self.place_BT] * keep_BT

    def jagged(self, block_BT: Tensor) -> Tensor:
        """[B, T, ...] as [N, ...], without padding."""
        return block_BT[self.is_entry_BT]
