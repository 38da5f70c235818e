"""The newest events as vectors that have read each other; what is older, another reader reads."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.hstu import HSTUBlock
from sidrec_torchrec.ranker.readers.base import Reader, Requests
from sidrec_torchrec.ranker.readers.history import PaddedHistory, pool_requests
from sidrec_torchrec.ranker.side_information import SideInformation
from sidrec_torchrec.ranker.targets import Targets, newest_events


class BlockReader(nn.Module):
    """Reads each row's newest events as vectors that have read each other, and what is older by another reader.

    The newest are up to ``block_events`` events before the row's first target, and those since: all targets of a row
    read the same older events, and blocks and targets alike read no event but earlier ones, so that the blocks run once
    per row and yet exactly for each of its targets.

    Args:
        older: reads what is older, and makes item vectors and queries.
        config: sizes.
        num_actions: actions an event can have.
        features: number of codes of each feature of an event, by name.
    """

    def __init__(
        self, older: Reader, config: RankerConfig, num_actions: int, features: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.older = older
        self.block_events = config.block_events
        self.side = SideInformation.of(num_actions, features)
        self.action = nn.Embedding(self.side.num_rows, config.dim)
        self.side.start(self.action.weight)
        self.blocks = nn.ModuleList(HSTUBlock(config.dim, config.num_heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.attention = TargetAttention(config.dim, config.num_heads, num_actions, features)

    @property
    def reads_codes(self) -> bool:
        """See ``Reader``: what ``older`` reads."""
        return self.older.reads_codes

    @property
    def unservable(self) -> str | None:
        """See ``Reader``: whether ``older`` can be served."""
        return self.older.unservable

    @property
    def num_pools(self) -> int:
        """Vectors pooled for each target: those of ``older``, and as many of the newest as there are queries."""
        return self.older.num_pools + 1 + self.older.queries.num_learned

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """As ``older``'s, followed by what the queries pool of the newest events: float [S, D] and [S, num_pools, D]."""
        newest_N = newest_events(batch, self.block_events)
        older = replace(batch, visible_N=batch.visible_N & ~newest_N)
        q_SD, older_SPD = self.older(older, items, Targets.of(older))
        event_K = newest_N.nonzero().squeeze(1)
        history = PaddedHistory.of(batch, event_K)
        x_KD = self.older.item_vectors(items, event_K, batch.has_item_N)
        x_KD = x_KD + self.side.embed(batch.side_NC[event_K], self.action.weight)
        x_BTD, gaps_BTT = history.layout.pad(x_KD), history.gaps(history.time_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, gaps_BTT, history.layout.is_entry_BT)
        x_KD = self.norm(history.layout.jagged(x_BTD))
        newest_SPD = history.pool(self.attention, self.older.queries(q_SD), targets, x_KD)
        return q_SD, torch.cat([older_SPD, newest_SPD], dim=1)

    def serve(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """As ``older``'s, followed by what the queries pool of the newest ``block_events`` events of each request."""
        begin_B, end_B = requests.begin_B, requests.end_B
        newest_B = (end_B - begin_B).clamp_max(self.block_events)
        q_MD, older_MPD = self.older.serve(replace(requests, end_B=end_B - newest_B))
        B, K = begin_B.shape[0], self.block_events
        place_BK = end_B.unsqueeze(1) + torch.arange(-K, 0, device=end_B.device)
        is_event_BK = place_BK >= begin_B.unsqueeze(1)
        # padding reads one more event than there are, so that there may be none
        place_X = torch.where(is_event_BK, place_BK, requests.time_N.shape[0]).flatten()
        side_XC, time_X = (_pad_row(x_N)[place_X] for x_N in (requests.side_NC, requests.time_N))
        items, has_item = _pad_row(requests.items), _pad_row(requests.has_item_N)
        x_XD = self.older.item_vectors(items, place_X, has_item) + self.side.embed(side_XC, self.action.weight)
        time_BK = time_X.view(B, K)
        gaps_BKK = gap_bucket(time_BK.unsqueeze(2) - time_BK.unsqueeze(1))
        x_BKD = x_XD.unflatten(0, (B, K))
        for block in self.blocks:
            x_BKD = block(x_BKD, gaps_BKK, is_event_BK)
        row_B = torch.arange(B, device=end_B.device) * K
        newest = replace(requests, side_NC=side_XC, time_N=time_X, begin_B=row_B + K - newest_B, end_B=row_B + K)
        newest_MPD = pool_requests(self.attention, self.older.queries, q_MD, self.norm(x_BKD).flatten(0, 1), newest)
        return q_MD, torch.cat([older_MPD, newest_MPD], dim=1)


def _pad_row(x: Tensor) -> Tensor:
    """With one more row, of zeros."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
