"""The targets of a batch, and the events each may read; jagged, so that nothing grows with the longest row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sidrec_torchrec.data.batches import RankBatch


def newest_events(batch: RankBatch, count: int) -> Tensor:
    """Of the visible events, the newest ``count`` before each row's first target, and those since; bool [N]."""
    row_N = torch.repeat_interleave(batch.lengths_B)
    before_N1 = torch.nn.functional.pad(batch.visible_N.long().cumsum(0), (1, 0))  # visible events before each
    first_target_B = batch.lengths_B.cumsum(0) - batch.num_targets_B
    return batch.visible_N & (before_N1[:-1] >= (before_N1[first_target_B] - count)[row_N])


@dataclass(frozen=True)
class Targets:
    """S targets, in the order of events.

    Args:
        event_S: int64, place of each target among the batch's N events.
        row_S: int64, its row.
        visible_V: int64, places of the V events that later ones may read.
        begin_S, end_S: int64; a target reads the visible events begin .. end - 1: those of its row before it.
    """

    event_S: Tensor
    row_S: Tensor
    visible_V: Tensor
    begin_S: Tensor
    end_S: Tensor

    @staticmethod
    def of(batch: RankBatch) -> "Targets":
        """The batch's targets: those of the last ``num_targets_B`` events of each row that have an item."""
        ends_B = batch.lengths_B.cumsum(0)
        row_S = torch.repeat_interleave(batch.num_targets_B)
        rank_S = (
            torch.arange(len(row_S), device=row_S.device) - (batch.num_targets_B.cumsum(0) - batch.num_targets_B)[row_S]
        )
        event_S = (ends_B - batch.num_targets_B)[row_S] + rank_S
        scored_S = batch.has_item_N[event_S].nonzero().squeeze(1)
        event_S, row_S = event_S[scored_S], row_S[scored_S]
        # Orders do not fall within a row, so that a row's events before a target are those of smaller order.
        row_N = torch.repeat_interleave(batch.lengths_B)
        span = batch.order_N.max() + 2
        place_N = row_N * span + batch.order_N
        first_N = torch.searchsorted(place_N, place_N[event_S])  # the first event of the target's own order
        before_N1 = torch.nn.functional.pad(batch.visible_N.long().cumsum(0), (1, 0))  # visible events before each
        return Targets(
            event_S=event_S,
            row_S=row_S,
            visible_V=batch.visible_N.nonzero().squeeze(1),
            begin_S=before_N1[(ends_B - batch.lengths_B)[row_S]],
            end_S=before_N1[first_N],
        )
