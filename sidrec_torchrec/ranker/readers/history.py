"""Some events of each row in padded blocks, and what targets pool of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.padding import RowLayout
from sidrec_torchrec.ranker.readers.base import Queries, Requests
from sidrec_torchrec.ranker.targets import Targets


@dataclass(frozen=True)
class PaddedHistory:
    """Some events of each row, in padded blocks.

    Args:
        batch: whose.
        layout: of the events.
        side_BTC: int64, action and features.
        time_BT, order_BT: int64.
    """

    batch: RankBatch
    layout: RowLayout
    side_BTC: Tensor
    time_BT: Tensor
    order_BT: Tensor

    @staticmethod
    def of(batch: RankBatch, event_K: Tensor) -> "PaddedHistory":
        """The events at places ``event_K``, int64, rising."""
        row_K = torch.repeat_interleave(batch.lengths_B)[event_K]
        layout = RowLayout.of(torch.bincount(row_K, minlength=len(batch.lengths_B)))
        columns = (batch.side_NC, batch.timestamp_N, batch.order_N)
        return PaddedHistory(batch, layout, *(layout.pad(values_N[event_K]) for values_N in columns))

    def gaps(self, time_BM: Tensor) -> Tensor:
        """Time-gap bucket from each of these times back to each event, int32 [B, M, T]."""
        return gap_bucket(time_BM.unsqueeze(2) - self.time_BT.unsqueeze(1))

    def pool(self, attention: TargetAttention, query_SPD: Tensor, targets: Targets, items_KD: Tensor) -> Tensor:
        """What each target's queries pool of the events before it, float [S, P, D]."""
        asks = RowLayout.of(torch.bincount(targets.row_S, minlength=len(self.batch.lengths_B)))
        time_BM, order_BM = (asks.pad(x_N[targets.event_S]) for x_N in (self.batch.timestamp_N, self.batch.order_N))
        reads_BMT = self.layout.is_entry_BT.unsqueeze(1) & (self.order_BT.unsqueeze(1) < order_BM.unsqueeze(2))
        items_BTD, gaps_BMT = self.layout.pad(items_KD), self.gaps(time_BM)
        timeless = query_SPD.shape[1] - 1  # all but the target's own
        pooled_BMPD = attention(asks.pad(query_SPD), items_BTD, self.side_BTC, gaps_BMT, reads_BMT, timeless)
        return asks.jagged(pooled_BMPD)


def pool_requests(
    attention: TargetAttention, queries: Queries, q_MD: Tensor, items_ND: Tensor, requests: Requests
) -> Tensor:
    """As ``PaddedHistory.pool``, of requests' candidates, float [M, P, D]; learned queries read each history once."""
    side_NC = requests.side_NC
    pooled = [attention.shared(q_MD, items_ND, side_NC, requests.gap_N, *requests.ranges).unsqueeze(1)]
    if queries.seeds_KD is not None:
        B, K = requests.begin_B.shape[0], queries.num_learned
        query_XD = queries.seeds_KD.repeat(B, 1)
        begin_X, end_X = (x_B.repeat_interleave(K) for x_B in (requests.begin_B, requests.end_B))
        pooled_XD = attention.shared(query_XD, items_ND, side_NC, None, begin_X, end_X)
        pooled.append(pooled_XD.unflatten(0, (B, K))[requests.request_M])
    return torch.cat(pooled, dim=1)
