"""The long-sequence ranker: item vectors -> target attention over the history -> feature interaction -> a logit per task."""

import math
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
from sidrec_torchrec.data.tasks import UNKNOWN, label_of, num_actions
from sidrec_torchrec.errors import SidrecError, check_at_least, check_share
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
        task_weights: weight of each task's loss, in the order of the tasks; none given means 1 each.
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
    task_weights: tuple[float, ...] = ()

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
        if not all(0 < weight < math.inf for weight in self.task_weights):
            raise ValueError(f"task_weights must be above 0, got {self.task_weights}")

    def weights(self, num_tasks: int) -> tuple[float, ...]:
        """Weight of each task's loss.

        Raises:
            SidrecError: if ``task_weights`` are of another number of tasks.
        """
        if self.task_weights and len(self.task_weights) != num_tasks:
            raise SidrecError(f"task_weights must name {num_tasks}, one per task, or none; got {self.task_weights}")
        return self.task_weights or (1.0,) * num_tasks


@dataclass(frozen=True)
class RankerOutput:
    """Predictions for S targets, jagged, and K tasks.

    Args:
        prediction: float32 [S, K], probability of a positive.
        label: float32 [S, K]; 0 where it is missing.
        weight: float32 [S, K]; 0 where the label is missing, and for targets that only fill up a process's share.
        seen: bool [S], whether the target's item occurs in training.
        loss_sum: float32 [K], summed logistic loss of this process's targets.
        global_targets: float32 scalar, targets of the batch over all processes.
    """

    prediction: Tensor
    label: Tensor
    weight: Tensor
    seen: Tensor
    loss_sum: Tensor
    global_targets: Tensor


class Ranker(nn.Module):
    """Predicts the labels of each target of a batch from the events before it; all tasks share everything but the last map.

    Args:
        config: sizes.
        items: the arm's module: the batch's item KJT -> float [N, items_dim], or, for attention to codes, packed SIDs.
        items_dim: width of the arm's features.
        events: the SIDs, for attention to codes.
        user_features: number of codes by user feature.
        device: where to build the user tables.
        num_tasks: labels of an event.
    """

    def __init__(
        self,
        config: RankerConfig,
        items: nn.Module,
        items_dim: int,
        events: SIDEConfig | None,
        user_features: dict[str, int],
        device: torch.device,
        num_tasks: int = 1,
    ) -> None:
        super().__init__()
        self.items = items
        self.users = user_tables(user_features, config.dim, device) if user_features else None
        self.head = RankerHead(config, items_dim, events, tuple(user_features), device, num_tasks)

    def forward(self, batch: RankBatch) -> tuple[Tensor, RankerOutput]:
        """Loss and predictions.

        Returns:
            The weighted sum over tasks of the mean logistic loss over this batch's targets, of all processes, that have
            the task's label; scaled so that the mean over processes (which is what data parallelism takes of gradients)
            is the loss of the whole batch. And the predictions.
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
        num_tasks: int,
    ) -> None:
        super().__init__()
        self.user_features = user_features
        self.num_tasks = num_tasks
        self.register_buffer("weights_K", torch.tensor(config.weights(num_tasks), device=device), persistent=False)
        actions = num_actions(num_tasks)
        vectors = ItemVectors(items_dim, config.item_hidden, config.dim, config.dropout).to(device)
        if config.attention == "codes":
            self.reader = CodeReader(vectors, events, config.dim, config.num_heads, config.seeds, actions, device)
        else:
            self.reader = VectorReader(vectors, config.dim, config.num_heads, config.seeds, actions).to(device)
        if config.blocks:
            newest = (config.blocks, config.block_events, config.dim, config.num_heads, actions)
            self.reader = BlockReader(self.reader, *newest).to(device)
        self.interaction = Interaction(config, len(user_features), num_tasks).to(device)

    def forward(self, batch: RankBatch, items: Tensor | None, users: KeyedTensor | None) -> tuple[Tensor, RankerOutput]:
        """See ``Ranker``; ``items`` is what the arm's module gave."""
        targets = Targets.of(batch)
        q_SD, pooled_SPD = self.reader(batch, items, targets)
        context = Context.of(batch, targets, self.num_tasks)
        # by name: the order of a KeyedTensor's values is that of the shards
        users_SD = [users[name][targets.row_S] for name in self.user_features] if users is not None else []
        logit_SK = self.interaction(q_SD, pooled_SPD, context, users_SD)

        digit_SK = _labels(batch.action_N[targets.event_S], self.num_tasks)
        label_SK = (digit_SK == 1).to(logit_SK.dtype)
        weight_SK = batch.weight_B[targets.row_S].unsqueeze(1) * (digit_SK != UNKNOWN)
        loss_SK = F.binary_cross_entropy_with_logits(logit_SK, label_SK, weight=weight_SK, reduction="none")
        loss_K = loss_SK.sum(0)
        means_K = loss_K / batch.global_labels_K.clamp_min(1)  # a batch may have no label of a task
        return (means_K * self.weights_K).sum() * _world_size(), RankerOutput(
            prediction=logit_SK.detach().sigmoid(),
            label=label_SK,
            weight=weight_SK,
            seen=batch.seen_N[targets.event_S],
            loss_sum=loss_K.detach(),
            global_targets=batch.global_targets,
        )


@dataclass(frozen=True)
class Context:
    """What a target's history is like, whatever its items: how long, how recent, how positive.

    Args:
        count_S: int, bucket of the number of the user's events before the target.
        gap_S: int, bucket of the time since the last event it reads; the last bucket if it reads none.
        log_odds_SK: float, by task, of positives among the labels of the events it reads, with one of each kind added.
    """

    count_S: Tensor
    gap_S: Tensor
    log_odds_SK: Tensor

    @staticmethod
    def of(batch: RankBatch, targets: Targets, num_tasks: int) -> "Context":
        """The context of a batch's targets."""
        return Context.of_ranges(
            order_S=batch.order_N[targets.event_S],
            time_S=batch.timestamp_N[targets.event_S],
            begin_S=targets.begin_S,
            end_S=targets.end_S,
            time_V=batch.timestamp_N[targets.visible_V],
            action_V=batch.action_N[targets.visible_V],
            num_tasks=num_tasks,
        )

    @staticmethod
    def of_ranges(
        *,
        order_S: Tensor,
        time_S: Tensor,
        begin_S: Tensor,
        end_S: Tensor,
        time_V: Tensor,
        action_V: Tensor,
        num_tasks: int,
    ) -> "Context":
        """The context of targets that each read the events begin .. end - 1 of V; all int64."""
        label_VK = _labels(action_V, num_tasks)
        counts_V1K = [F.pad((label_VK == value).long().cumsum(0), (0, 0, 1, 0)) for value in (0, 1)]
        negative_SK, positive_SK = (count_V1K[end_S] - count_V1K[begin_S] for count_V1K in counts_V1K)
        last_S = F.pad(time_V, (1, 0))[end_S]  # the first stands for none
        gap_S = gap_bucket(time_S - last_S)
        return Context(
            count_S=gap_bucket(order_S),
            gap_S=torch.where(end_S > begin_S, gap_S, GAP_BUCKETS - 1),
            log_odds_SK=((positive_SK + 1) / (negative_SK + 1)).log(),
        )


class Interaction(nn.Module):
    """From a target's features to its logits."""

    def __init__(self, config: RankerConfig, num_user_features: int, num_tasks: int) -> None:
        super().__init__()
        self.count = nn.Embedding(_COUNT_BUCKETS, _CONTEXT_DIM)
        self.gap = nn.Embedding(GAP_BUCKETS, _CONTEXT_DIM)
        pools = (1 + config.seeds) * (2 if config.blocks else 1)
        width = (1 + 2 * pools + num_user_features) * config.dim + 2 * _CONTEXT_DIM + num_tasks
        self.cross = LowRankCrossNet(width, config.cross_layers, low_rank=config.dim)
        self.mlp = MLP(width, list(config.head_dims), activation="relu")
        self.logit = nn.Linear(config.head_dims[-1], num_tasks)

    def forward(self, q_SD: Tensor, pooled_SPD: Tensor, context: Context, users_SD: list[Tensor]) -> Tensor:
        """Logits, float [S, K], of targets with vectors ``q_SD`` whose queries pooled ``pooled_SPD``."""
        features = [q_SD, pooled_SPD.flatten(1), (q_SD.unsqueeze(1) * pooled_SPD).flatten(1)]
        features += [self.count(context.count_S), self.gap(context.gap_S), context.log_odds_SK, *users_SD]
        return self.logit(self.mlp(self.cross(torch.cat(features, dim=1))))


def _labels(action_N: Tensor, num_tasks: int) -> Tensor:
    """Each task's label of each event, int64 [N, K]: 0, 1 or UNKNOWN."""
    return torch.stack([label_of(action_N, task) for task in range(num_tasks)], dim=1)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
