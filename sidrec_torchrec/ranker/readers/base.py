"""How a ranker reads histories: over vectors of all events, or in code space; the newest perhaps as blocks make them."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.hstu import HSTUBlock
from sidrec_torchrec.ranker.padding import RowLayout
from sidrec_torchrec.ranker.targets import Targets, newest_events
from sidrec_torchrec.side.code_attention import CodeAttention
from sidrec_torchrec.side.expansion import SIDEConfig


class Queries(nn.Module):
    """What each target asks of a history: its own vector, and learned seeds that are the same for all targets.

    What the seeds pool says what the history is like whatever the target is. Source: pooling by multi-head attention,
    Lee et al. 2019 (Set Transformer), section 3.2; the seeds share the maps of the target's own attention.

    Args:
        seeds: how many; P is one more.
        dim: width D of queries.
    """

    def __init__(self, seeds: int, dim: int) -> None:
        super().__init__()
        # like item vectors, whose LayerNorm gives them this scale
        self.seeds_KD = nn.Parameter(torch.randn(seeds, dim)) if seeds else None

    def forward(self, q_SD: Tensor) -> Tensor:
        """float [..., P, D] of the targets' own, [..., D]."""
        own_S1D = q_SD.unsqueeze(-2)
        if self.seeds_KD is None:
            return own_S1D
        return torch.cat([own_S1D, self.seeds_KD.expand(*q_SD.shape[:-1], -1, -1)], dim=-2)


class ItemVectors(nn.Module):
    """An arm's item features to item vectors: a linear map plus a perceptron, normalized.

    Args:
        items_dim: width of the features.
        hidden: of the perceptron.
        dim: width D of the vectors.
        dropout: share of a vector's components dropped in training.
    """

    def __init__(self, items_dim: int, hidden: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(items_dim, dim)
        self.mlp = nn.Sequential(nn.Linear(items_dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features_NE: Tensor) -> Tensor:
        """float [N, D]."""
        return self.dropout(self.norm(self.linear(features_NE) + self.mlp(features_NE)))


class VectorReader(nn.Module):
    """Reads vectors of all events, in padded blocks; for any arm.

    Args:
        vectors: item features to vectors.
        dim: width D of the vectors.
        num_heads: of the attention.
        seeds: queries besides the target's own; see ``Queries``.
        num_actions: actions an event can have.
    """

    def __init__(self, vectors: ItemVectors, dim: int, num_heads: int, seeds: int, num_actions: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.queries = Queries(seeds, dim)
        self.action = nn.Embedding(num_actions, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = TargetAttention(dim, num_heads, num_actions)

    def item_vectors(self, items_NE: Tensor | None, event_K: Tensor) -> Tensor:
        """Vectors of some events' items, float [K, D]; see ``forward``."""
        if items_NE is None:  # all items alike
            linear = self.vectors.linear
            return self.vectors(linear.weight.new_zeros(len(event_K), linear.in_features))
        return self.vectors(items_NE[event_K])

    def forward(self, batch: RankBatch, items_NE: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """Vectors of the targets, float [S, D], and what each of their queries pools, float [S, P, D].

        Args:
            batch: events.
            items_NE: the arm's features of each event, float; None if it has none.
            targets: of the batch.
        """
        x_ND = self.item_vectors(items_NE, torch.arange(len(batch.action_N), device=batch.action_N.device))
        q_SD, x_VD = x_ND[targets.event_S], x_ND[targets.visible_V]
        events_VD = self.norm(x_VD + self.action(batch.action_N[targets.visible_V]))
        history = _History.of(batch, targets.visible_V)
        return q_SD, history.pool(self.attention, self.queries(q_SD), targets, x_VD, events_VD)


class CodeReader(nn.Module):
    """Reads packed SIDs in code space: only targets become vectors, and nothing is padded.

    Args:
        vectors: SIDE's vectors to item vectors.
        events: codec and mode of the SIDs.
        dim: width D of the vectors.
        num_heads: of the attention.
        seeds: queries besides the target's own; see ``Queries``.
        num_actions: actions an event can have.
        device: where to build it.
    """

    def __init__(
        self,
        vectors: ItemVectors,
        events: SIDEConfig,
        dim: int,
        num_heads: int,
        seeds: int,
        num_actions: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.vectors = vectors
        self.queries = Queries(seeds, dim).to(device)
        self.attention = CodeAttention(
            events, dim, num_heads, side_information={"action": num_actions}, time_gaps=True, device=device
        )

    def item_vectors(self, words_NW: Tensor, event_K: Tensor) -> Tensor:
        """Vectors of some events' items, float [K, D]."""
        return self.vectors(self.attention.events(words_NW[event_K]))

    def forward(self, batch: RankBatch, words_NW: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """As ``VectorReader.forward``; ``words_NW`` are the events' packed SIDs, int64."""
        q_SD = self.item_vectors(words_NW, targets.event_S)
        pooled_SPD = self.attention(
            self.queries(q_SD),
            words_NW[targets.visible_V],
            targets.begin_S,
            targets.end_S,
            batch.action_N[targets.visible_V].unsqueeze(1),
            batch.timestamp_N[targets.visible_V],
            batch.timestamp_N[targets.event_S],
        )
        return q_SD, pooled_SPD


class BlockReader(nn.Module):
    """Reads each row's newest events as vectors that have read each other, and what is older by another reader.

    The newest are up to ``block_events`` events before the row's first target, and those since: all targets of a row
    read the same older events, and blocks and targets alike read no event but earlier ones, so that the blocks run once
    per row and yet exactly for each of its targets.

    Args:
        older: reads what is older, and makes item vectors.
        blocks: how many.
        block_events: how many of the events before a row's first target they read.
        dim: width D of the vectors.
        num_heads: of the blocks and of the attention to what they give.
        num_actions: actions an event can have.
    """

    def __init__(
        self,
        older: VectorReader | CodeReader,
        blocks: int,
        block_events: int,
        dim: int,
        num_heads: int,
        num_actions: int,
    ) -> None:
        super().__init__()
        self.older = older
        self.block_events = block_events
        self.action = nn.Embedding(num_actions, dim)
        self.blocks = nn.ModuleList(HSTUBlock(dim, num_heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim)
        self.attention = TargetAttention(dim, num_heads, num_actions)

    def forward(self, batch: RankBatch, items: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """As ``older``'s, followed by what the queries pool of the newest events: float [S, D] and [S, 2 P, D]."""
        newest_N = newest_events(batch, self.block_events)
        older = replace(batch, visible_N=batch.visible_N & ~newest_N)
        q_SD, older_SPD = self.older(older, items, Targets.of(older))
        event_K = newest_N.nonzero().squeeze(1)
        history = _History.of(batch, event_K)
        x_KD = self.older.item_vectors(items, event_K) + self.action(batch.action_N[event_K])
        x_BTD, gaps_BTT = history.layout.pad(x_KD), history.gaps(history.time_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, gaps_BTT, history.layout.is_entry_BT)
        x_KD = self.norm(history.layout.jagged(x_BTD))
        newest_SPD = history.pool(self.attention, self.older.queries(q_SD), targets, x_KD, x_KD)
        return q_SD, torch.cat([older_SPD, newest_SPD], dim=1)


@dataclass(frozen=True)
class _History:
    """Some events of each row, in padded blocks.

    Args:
        batch: whose.
        layout: of the events.
        action_BT, time_BT, order_BT: int64.
    """

    batch: RankBatch
    layout: RowLayout
    action_BT: Tensor
    time_BT: Tensor
    order_BT: Tensor

    @staticmethod
    def of(batch: RankBatch, event_K: Tensor) -> "_History":
        """The events at places ``event_K``, int64, rising."""
        row_K = torch.repeat_interleave(batch.lengths_B)[event_K]
        layout = RowLayout.of(torch.bincount(row_K, minlength=len(batch.lengths_B)))
        columns = (batch.action_N, batch.timestamp_N, batch.order_N)
        return _History(batch, layout, *(layout.pad(values_N[event_K]) for values_N in columns))

    def gaps(self, time_BM: Tensor) -> Tensor:
        """Time-gap bucket from each of these times back to each event, int32 [B, M, T]."""
        return gap_bucket(time_BM.unsqueeze(2) - self.time_BT.unsqueeze(1))

    def pool(
        self, attention: TargetAttention, query_SPD: Tensor, targets: Targets, items_KD: Tensor, events_KD: Tensor
    ) -> Tensor:
        """What each target's queries pool of the events before it, float [S, P, D]."""
        asks = RowLayout.of(self.batch.num_targets_B)
        time_BM, order_BM = (asks.pad(x_N[targets.event_S]) for x_N in (self.batch.timestamp_N, self.batch.order_N))
        reads_BMT = self.layout.is_entry_BT.unsqueeze(1) & (self.order_BT.unsqueeze(1) < order_BM.unsqueeze(2))
        items_BTD, events_BTD = self.layout.pad(items_KD), self.layout.pad(events_KD)
        pooled_BMPD = attention(
            asks.pad(query_SPD), items_BTD, events_BTD, self.action_BT, self.gaps(time_BM), reads_BMT
        )
        return asks.jagged(pooled_BMPD)
