"""How a ranker reads histories: over vectors of all events, or in code space."""

import torch
from torch import Tensor, nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.padding import RowLayout
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.code_attention import CodeAttention
from sidrec_torchrec.side.expansion import SIDEConfig

NUM_ACTIONS = 2


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
    """

    def __init__(self, vectors: ItemVectors, dim: int, num_heads: int, seeds: int) -> None:
        super().__init__()
        self.vectors = vectors
        self.queries = Queries(seeds, dim)
        self.action = nn.Embedding(NUM_ACTIONS, dim)
        self.norm = nn.LayerNorm(dim)
        self.attention = TargetAttention(dim, num_heads, NUM_ACTIONS)

    def forward(self, batch: RankBatch, items_NE: Tensor | None, targets: Targets) -> tuple[Tensor, Tensor]:
        """Vectors of the targets, float [S, D], and what each of their queries pools, float [S, P, D].

        Args:
            batch: events.
            items_NE: the arm's features of each event, float; None if it has none.
            targets: of the batch.
        """
        if items_NE is None:  # all items alike
            linear = self.vectors.linear
            items_NE = linear.weight.new_zeros(len(batch.action_N), linear.in_features)
        layout = RowLayout.of(batch.lengths_B, batch.num_targets_B)
        x_BTD = layout.pad(self.vectors(items_NE))
        action_BT, time_BT, order_BT = map(layout.pad, (batch.action_N, batch.timestamp_N, batch.order_N))
        q_BMD, time_BM, order_BM = map(layout.targets, (x_BTD, time_BT, order_BT))
        visible_BT = layout.pad(batch.visible_N)  # padding is not visible
        mask_BMT = visible_BT.unsqueeze(1) & (order_BT.unsqueeze(1) < order_BM.unsqueeze(2))
        gaps_BMT = gap_bucket(time_BM.unsqueeze(2) - time_BT.unsqueeze(1))
        events_BTD = self.norm(x_BTD + self.action(action_BT))
        pooled_BMPD = self.attention(self.queries(q_BMD), x_BTD, events_BTD, action_BT, gaps_BMT, mask_BMT)
        return q_BMD[layout.is_target_BM], pooled_BMPD[layout.is_target_BM]


class CodeReader(nn.Module):
    """Reads packed SIDs in code space: only targets become vectors, and nothing is padded.

    Args:
        vectors: SIDE's vectors to item vectors.
        events: codec and mode of the SIDs.
        dim: width D of the vectors.
        num_heads: of the attention.
        seeds: queries besides the target's own; see ``Queries``.
        device: where to build it.
    """

    def __init__(
        self, vectors: ItemVectors, events: SIDEConfig, dim: int, num_heads: int, seeds: int, device: torch.device
    ) -> None:
        super().__init__()
        self.vectors = vectors
        self.queries = Queries(seeds, dim).to(device)
        self.attention = CodeAttention(
            events, dim, num_heads, side_information={"action": NUM_ACTIONS}, time_gaps=True, device=device
        )

    def forward(self, batch: RankBatch, words_NW: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """As ``VectorReader.forward``; ``words_NW`` are the events' packed SIDs, int64."""
        q_SD = self.vectors(self.attention.events(words_NW[targets.event_S]))
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
