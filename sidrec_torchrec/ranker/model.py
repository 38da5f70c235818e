"""The long-sequence ranker: item vectors -> target attention over the history -> feature interaction -> logit."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedTensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.errors import check_at_least, check_share
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, gap_bucket
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.padding import RowLayout

NUM_ACTIONS = 2
_COUNT_BUCKETS = 32
_CONTEXT_DIM = 16


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Sizes of the ranker; the same for every arm.

    Args:
        dim: width of item vectors, attention and user tables.
        num_heads: attention heads.
        item_hidden: hidden width of the map from an arm's item features to item vectors.
        cross_layers: layers of the low-rank cross network (DCN-v2).
        head_dims: hidden widths of the final perceptron.
        dropout: share of an item vector's components dropped in training.
    """

    dim: int = 64
    num_heads: int = 4
    item_hidden: int = 128
    cross_layers: int = 1
    head_dims: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(self, 1, "dim", "num_heads", "item_hidden", "cross_layers")
        check_share(self, "dropout")
        if self.dim % 4 or self.dim % self.num_heads:  # fbgemm wants table rows of whole 16 bytes
            raise ValueError(f"dim must be a multiple of 4 and of num_heads ({self.num_heads}), got {self.dim}")
        if not self.head_dims or min(self.head_dims) < 1:
            raise ValueError(f"head_dims must be one or more widths of at least 1, got {self.head_dims}")


@dataclass(frozen=True)
class RankerOutput:
    """Predictions for S targets, jagged.

    Args:
        prediction: float32 [S], probability of a positive.
        label: float32 [S].
        weight: float32 [S]; 0 for targets that only fill up a process's share.
        seen: bool [S], whether the target's item occurs in training.
        loss_sum: float32 scalar, summed logistic loss of this process's targets.
        global_targets: float32 scalar, targets of the batch over all processes.
    """

    prediction: Tensor
    label: Tensor
    weight: Tensor
    seen: Tensor
    loss_sum: Tensor
    global_targets: Tensor


class Ranker(nn.Module):
    """Predicts the label of each target of a batch from the events before it.

    Args:
        config: sizes.
        items: the arm's module: the batch's item KJT -> float [N, items_dim].
        items_dim: its width.
        user_features: number of codes by user feature.
        device: where to build the user tables.
    """

    def __init__(
        self,
        config: RankerConfig,
        items: nn.Module,
        items_dim: int,
        user_features: dict[str, int],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.items = items
        self.users = user_tables(user_features, config.dim, device) if user_features else None
        self.head = RankerHead(config, items_dim, tuple(user_features)).to(device)

    def forward(self, batch: RankBatch) -> tuple[Tensor, RankerOutput]:
        """Loss and predictions.

        Returns:
            The mean logistic loss over this batch's targets of all processes, scaled so that the mean over processes
            (which is what data parallelism takes of gradients) is the loss of the whole batch; and the predictions.
        """
        items_ND = self.items(batch.items)
        users = self.users(batch.users) if self.users is not None else None
        return self.head(batch, items_ND, users)


def user_tables(user_features: dict[str, int], dim: int, device: torch.device) -> EmbeddingBagCollection:
    """One table per user feature; zero at the start, so that the result does not depend on how it is sharded."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"user_{name}",
                embedding_dim=dim,
                num_embeddings=size,
                feature_names=[name],
                init_fn=nn.init.zeros_,
            )
            for name, size in user_features.items()
        ],
        device=device,
    )


class RankerHead(nn.Module):
    """All that follows the tables; dense, replicated."""

    def __init__(self, config: RankerConfig, items_dim: int, user_features: tuple[str, ...]) -> None:
        super().__init__()
        self.user_features = user_features
        dim = config.dim
        self.item_linear = nn.Linear(items_dim, dim)
        self.item_mlp = nn.Sequential(
            nn.Linear(items_dim, config.item_hidden), nn.GELU(), nn.Linear(config.item_hidden, dim)
        )
        self.item_norm = nn.LayerNorm(dim)
        self.item_dropout = nn.Dropout(config.dropout)
        self.action = nn.Embedding(NUM_ACTIONS, dim)
        self.event_norm = nn.LayerNorm(dim)
        self.attention = TargetAttention(dim, config.num_heads, NUM_ACTIONS)
        self.count = nn.Embedding(_COUNT_BUCKETS, _CONTEXT_DIM)
        self.gap = nn.Embedding(GAP_BUCKETS, _CONTEXT_DIM)
        width = 3 * dim + len(user_features) * dim + 2 * _CONTEXT_DIM + 1
        self.cross = LowRankCrossNet(width, config.cross_layers, low_rank=dim)
        self.mlp = MLP(width, list(config.head_dims), activation="relu")
        self.logit = nn.Linear(config.head_dims[-1], 1)

    def forward(
        self, batch: RankBatch, items_NE: Tensor | None, users: KeyedTensor | None
    ) -> tuple[Tensor, RankerOutput]:
        layout = RowLayout.of(batch.lengths_B, batch.num_targets_B)
        if items_NE is None:  # an arm without item content: all items alike
            items_NE = self.item_linear.weight.new_zeros(len(batch.action_N), self.item_linear.in_features)
        x_ND = self.item_dropout(self.item_norm(self.item_linear(items_NE) + self.item_mlp(items_NE)))
        x_BTD = layout.pad(x_ND)
        action_BT = layout.pad(batch.action_N)
        time_BT = layout.pad(batch.timestamp_N)
        order_BT = layout.pad(batch.order_N)
        visible_BT = layout.pad(batch.visible_N)  # padding is not visible
        q_BMD, time_BM, order_BM = map(layout.targets, (x_BTD, time_BT, order_BT))

        mask_BMT = visible_BT.unsqueeze(1) & (order_BT.unsqueeze(1) < order_BM.unsqueeze(2))
        gaps_BMT = gap_bucket(time_BM.unsqueeze(2) - time_BT.unsqueeze(1))
        events_BTD = self.event_norm(x_BTD + self.action(action_BT))
        pooled_BMD = self.attention(q_BMD, x_BTD, events_BTD, action_BT, gaps_BMT, mask_BMT)

        # Context of a target: how much came before, how recently, and how much of it was positive.
        count_BM = gap_bucket(order_BM)
        recent_BM = gaps_BMT.masked_fill(~mask_BMT, GAP_BUCKETS - 1).amin(-1)
        positive_BM = (mask_BMT & action_BT.bool().unsqueeze(1)).sum(-1)
        read_BM = mask_BMT.sum(-1)
        log_odds_BM = ((positive_BM + 1) / (read_BM - positive_BM + 1)).log()

        features = [q_BMD, pooled_BMD, q_BMD * pooled_BMD, self.count(count_BM), self.gap(recent_BM)]
        features.append(log_odds_BM.unsqueeze(-1))
        if users is not None:
            # by name: the order of values() is that of the shards
            users_BF = torch.cat([users[name] for name in self.user_features], dim=1)
            features.append(users_BF.unsqueeze(1).expand(-1, q_BMD.shape[1], -1))
        features_SF = torch.cat(features, dim=-1)[layout.is_target_BM]
        crossed_SF = self.cross(features_SF)
        logit_S = self.logit(self.mlp(crossed_SF)).squeeze(-1)

        label_S = layout.targets(action_BT)[layout.is_target_BM].to(logit_S.dtype)
        weight_S = batch.weight_B.unsqueeze(1).expand_as(layout.is_target_BM)[layout.is_target_BM]
        seen_S = layout.targets(layout.pad(batch.seen_N))[layout.is_target_BM]
        loss_sum = F.binary_cross_entropy_with_logits(logit_S, label_S, weight=weight_S, reduction="sum")
        loss = loss_sum / batch.global_targets * _world_size()
        return loss, RankerOutput(
            prediction=logit_S.detach().sigmoid(),
            label=label_S,
            weight=weight_S,
            seen=seen_S,
            loss_sum=loss_sum.detach(),
            global_targets=batch.global_targets,
        )


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
