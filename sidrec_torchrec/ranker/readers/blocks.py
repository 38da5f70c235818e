"""The newest events as vectors that have read each other; what is older, another reader reads."""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.hstu import HSTUBlock
from sidrec_torchrec.ranker.readers.base import Reader
from sidrec_torchrec.ranker.readers.history import PaddedHistory
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
    """

    unservable: ClassVar[str | None] = (
        "has blocks, whose newest events are counted from a row's first target, which a request does not have; train one "
        "without --model.blocks"
    )

    def __init__(self, older: Reader, config: RankerConfig, num_actions: int) -> None:
        super().__init__()
        self.older = older
        self.block_events = config.block_events
        self.action = nn.Embedding(num_actions, config.dim)
        self.blocks = nn.ModuleList(HSTUBlock(config.dim, config.num_heads) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        self.attention = TargetAttention(config.dim, config.num_heads, num_actions)

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
        x_KD = self.older.item_vectors(items, event_K) + self.action(batch.action_N[event_K])
        x_BTD, gaps_BTT = history.layout.pad(x_KD), history.gaps(history.time_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, gaps_BTT, history.layout.is_entry_BT)
        x_KD = self.norm(history.layout.jagged(x_BTD))
        newest_SPD = history.pool(self.attention, self.older.queries(q_SD), targets, x_KD)
        return q_SD, torch.cat([older_SPD, newest_SPD], dim=1)
