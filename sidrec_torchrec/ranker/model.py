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
from sidrec_torchrec.ranker.readers import BlockReader, CodeReader, ItemVectors, VectorReader
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.expansion import SIDEConfig

ATTENTIONS = ("vectors", "codes")
_COUNT_BUCKETS = 32
_CONTEXT_DIM = 16


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """Sizes of the ranker; the same for every arm.

    Args:
        dim: width of item vectors, attention and user tables.
        num_heads: attention heads.
        attention: ``vectors`` attends to a vector per event; ``codes`` to packed SIDs, which are never decoded
            (the side arms alone have them): for long histories.
        seeds: learned queries that read what each target reads, besides the target itself.
        blocks: HSTU blocks in which the newest events read each other, before targets read them; older events are read as
            ``attention`` says.
        block_events: how many of the events before a row's first target the blocks read, besides those since.
        item_hidden: hidden width of the map from an arm's item features to item vectors.
        cross_layers: layers of the low-rank cross network (DCN-v2).
        head_dims: hidden widths of the final perceptron.
        dropout: share of an item vector's components dropped in training.
    """

    dim: int = 64
    num_heads: int = 4
    attention: str = "vectors"
    seeds: int = 0
    blocks: int = 0
    block_events: int = 256
    item_hidden: int = 128
    cross_layers: int = 1
    head_dims: tuple[int, ...] = (128, 64)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        check_at_least(self, 1, "dim", "num_heads", "item_hidden", "cross_layers", "block_events")
        check_at_least(self, 0, "seeds", "blocks")
        check_share(self, "dropout")
        if self.dim % 4 or self.dim % self.num_heads:  # fbgemm wants table rows of whole 16 bytes
            raise ValueError(f"dim must be a multiple of 4 and of num_heads ({self.num_heads}), got {self.dim}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got '{self.attention}'")
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
        items: the arm's module: the batch's item KJT -> float [N, items_dim], or, for attention to codes, packed SIDs.
        items_dim: width of the arm's features.
        events: the SIDs, for attention to codes.
        user_features: number of codes by user feature.
        device: where to build the user tables.
    """

    def __init__(
        self,
        config: RankerConfig,
        items: nn.Module,
        items_dim: int,
        events: SIDEConfig | None,
        user_features: dict[str, int],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.items = items
        self.users = user_tables(user_features, config.dim, device) if user_features else None
        self.head = RankerHead(config, items_dim, events, tuple(user_features), device)

    def forward(self, batch: RankBatch) -> tuple[Tensor, RankerOutput]:
        """Loss and predictions.

        Returns:
            The mean logistic loss over this batch's targets of all processes, scaled so that the mean over processes
            (which is what data parallelism takes of gradients) is the loss of the whole batch; and the predictions.
        """
        return self.rank(batch, self.items(batch.items))

    def rank(self, batch: RankBatch, items: Tensor | None) -> tuple[Tensor, RankerOutput]:
        """Loss and predictions, given what the arm's module gave."""
        users = None if self.users is None else self.users(batch.users)
        return self.head(batch, items, users)


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

    def __init__(
        self,
        config: RankerConfig,
        items_dim: int,
        events: SIDEConfig | None,
        user_features: tuple[str, ...],
        device: torch.device,
    ) -> None:
        super().__init__()
        self.user_features = user_features
        vectors = ItemVectors(items_dim, config.item_hidden, config.dim, config.dropout).to(device)
        if config.attention == "codes":
            self.reader = CodeReader(vectors, events, config.dim, config.num_heads, config.seeds, device)
        else:
            self.reader = VectorReader(vectors, config.dim, config.num_heads, config.seeds).to(device)
        if config.blocks:
            newest = (config.blocks, config.block_events, config.dim, config.num_heads)
            self.reader = BlockReader(self.reader, *newest).to(device)
        self.interaction = Interaction(config, len(user_features)).to(device)

    def forward(self, batch: RankBatch, items: Tensor | None, users: KeyedTensor | None) -> tuple[Tensor, RankerOutput]:
        """See ``Ranker``; ``items`` is what the arm's module gave."""
        targets = Targets.of(batch)
        q_SD, pooled_SPD = self.reader(batch, items, targets)
        context = Context.of(batch, targets)
        # by name: the order of a KeyedTensor's values is that of the shards
        users_SD = [users[name][targets.row_S] for name in self.user_features] if users is not None else []
        logit_S = self.interaction(q_SD, pooled_SPD, context, users_SD)

        label_S = batch.action_N[targets.event_S].to(logit_S.dtype)
        weight_S = batch.weight_B[targets.row_S]
        loss_sum = F.binary_cross_entropy_with_logits(logit_S, label_S, weight=weight_S, reduction="sum")
        loss = loss_sum / batch.global_targets * _world_size()
        return loss, RankerOutput(
            prediction=logit_S.detach().sigmoid(),
            label=label_S,
            weight=weight_S,
            seen=batch.seen_N[targets.event_S],
            loss_sum=loss_sum.detach(),
            global_targets=batch.global_targets,
        )


@dataclass(frozen=True)
class Context:
    """What a target's history is like, whatever its items: how long, how recent, how positive.

    Args:
        count_S: int, bucket of the number of the user's events before the target.
        gap_S: int, bucket of the time since the last event it reads; the last bucket if it reads none.
        log_odds_S: float, of positive events among those it reads, with one of each kind added.
    """

    count_S: Tensor
    gap_S: Tensor
    log_odds_S: Tensor

    @staticmethod
    def of(batch: RankBatch, targets: Targets) -> "Context":
        """The context of a batch's targets."""
        return Context.of_ranges(
            order_S=batch.order_N[targets.event_S],
            time_S=batch.timestamp_N[targets.event_S],
            begin_S=targets.begin_S,
            end_S=targets.end_S,
            time_V=batch.timestamp_N[targets.visible_V],
            action_V=batch.action_N[targets.visible_V],
        )

    @staticmethod
    def of_ranges(
        *, order_S: Tensor, time_S: Tensor, begin_S: Tensor, end_S: Tensor, time_V: Tensor, action_V: Tensor
    ) -> "Context":
        """The context of targets that each read the events begin .. end - 1 of V; all int64."""
        positive_V1 = F.pad(action_V.cumsum(0), (1, 0))
        positive_S = positive_V1[end_S] - positive_V1[begin_S]
        read_S = end_S - begin_S
        last_S = F.pad(time_V, (1, 0))[end_S]  # the first stands for none
        gap_S = gap_bucket(time_S - last_S)
        return Context(
            count_S=gap_bucket(order_S),
            gap_S=torch.where(read_S > 0, gap_S, GAP_BUCKETS - 1),
            log_odds_S=((positive_S + 1) / (read_S - positive_S + 1)).log(),
        )


class Interaction(nn.Module):
    """From a target's features to its logit."""

    def __init__(self, config: RankerConfig, num_user_features: int) -> None:
        super().__init__()
        self.count = nn.Embedding(_COUNT_BUCKETS, _CONTEXT_DIM)
        self.gap = nn.Embedding(GAP_BUCKETS, _CONTEXT_DIM)
        pools = (1 + config.seeds) * (2 if config.blocks else 1)
        width = (1 + 2 * pools + num_user_features) * config.dim + 2 * _CONTEXT_DIM + 1
        self.cross = LowRankCrossNet(width, config.cross_layers, low_rank=config.dim)
        self.mlp = MLP(width, list(config.head_dims), activation="relu")
        self.logit = nn.Linear(config.head_dims[-1], 1)

    def forward(self, q_SD: Tensor, pooled_SPD: Tensor, context: Context, users_SD: list[Tensor]) -> Tensor:
        """Logits, float [S], of targets with vectors ``q_SD`` whose queries pooled ``pooled_SPD``."""
        features = [q_SD, pooled_SPD.flatten(1), (q_SD.unsqueeze(1) * pooled_SPD).flatten(1)]
        features += [self.count(context.count_S), self.gap(context.gap_S), context.log_odds_S.unsqueeze(1), *users_SD]
        return self.logit(self.mlp(self.cross(torch.cat(features, dim=1)))).squeeze(1)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
