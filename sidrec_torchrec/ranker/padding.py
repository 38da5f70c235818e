"""Rows of jagged events as padded blocks, right-aligned so that every row's targets are the last columns."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Where the events of B rows stand in a block of T columns, and which of the last M columns are targets.

    Args:
        place_BT: int64, place of each column's event in the jagged order; 0 in padding.
        is_event_BT: False in padding.
        is_target_BM: True for the targets among the last M columns.
    """

    place_BT: Tensor
    is_event_BT: Tensor
    is_target_BM: Tensor

    @staticmethod
    def of(lengths_B: Tensor, num_targets_B: Tensor) -> "RowLayout":
        """The layout of rows with these lengths, the last ``num_targets_B`` events of each being targets (int64 [B])."""
        T, M = int(lengths_B.max()), int(num_targets_B.max())
        from_end_T = torch.arange(T, 0, -1, device=lengths_B.device)
        ends_B = lengths_B.cumsum(0)
        is_event_BT = from_end_T <= lengths_B.unsqueeze(1)
        place_BT = torch.where(is_event_BT, ends_B.unsqueeze(1) - from_end_T, 0)
        return RowLayout(place_BT, is_event_BT, from_end_T[T - M :] <= num_targets_B.unsqueeze(1))

    def pad(self, values_N: Tensor) -> Tensor:
        """[N, ...] events as [B, T, ...], zero (False) in padding."""
        block_BT = values_N[self.place_BT]
        keep_BT = self.is_event_BT.view(*self.is_event_BT.shape, *[1] * (values_N.ndim - 1))
        return block_BT & keep_BT if values_N.dtype == torch.bool else block_BT * keep_BT

    def targets(self, block_BT: Tensor) -> Tensor:
        """The last M columns of [B, T, ...]."""
        return block_BT[:, block_BT.shape[1] - self.is_target_BM.shape[1] :]
