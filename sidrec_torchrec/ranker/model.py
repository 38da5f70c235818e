"""The long-sequence ranker: item vectors -> target attention over the history -> feature interaction -> a logit per task."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.modules.mlp import MLP
from torchrec.sparse.jagged_tensor import KeyedTensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.features import Features
from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.data.tasks import UNKNOWN, label_of, num_actions
from sidrec_torchrec.names import escape
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers import ApartReader, BlockReader, HistoriesBy, Reader
from sidrec_torchrec.ranker.scales import Scales
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.expansion import SIDEConfig

_COUNT_BUCKETS = 32
_CONTEXT_DIM = 16
_HALF = 32  # bits
_LEAST_WEIGHT = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class RankerOutput:
    """Predictions for S targets, jagged, and K tasks.

    Args:
        prediction: float32 [S, K], probability of a positive, or the value that a regression predicts; those come last.
        label: float32 [S, K]; 0 where it is missing.
        weight: float32 [S, K], the event's; 0 where the label is missing, and for targets that only fill up a process's share.
        loss_sum: float32 [K], summed loss of this process's targets: logistic; squared, in units of the variance in training.
        global_targets: float32 scalar, targets of the batch over all processes.
    """

    prediction: Tensor
    label: Tensor
    weight: Tensor
    loss_sum: Tensor
    global_targets: Tensor


class Ranker(nn.Module):
    """Predicts the labels of each target of a batch from the events before it; all tasks share everything but the last map.

    Args:
        config: sizes.
        items: what the reader reads of the batch's item KJT: ``Reader.items`` of an arm.
        items_dim: width of the arm's features.
        sid: codec and mode of the packed SIDs, for a reader of codes.
        user_features: number of codes by user feature.
        device: where to build the user tables.
        num_tasks: labels of an event.
        features: of events.
        user_lists: the user features of which a user has a list of codes.
        regressions: numbers to be predicted besides.
    """

    def __init__(
        self,
        config: RankerConfig,
        items: nn.Module,
        items_dim: int,
        sid: SIDEConfig | None,
        user_features: dict[str, int],
        device: torch.device,
        num_tasks: int = 1,
        features: Features | None = None,
        user_lists: tuple[str, ...] = (),
        regressions: tuple[Regression, ...] = (),
    ) -> None:
        super().__init__()
        self.items = items
        self.user_lists = user_lists
        self.users = user_tables(user_features, config.dim, device, user_lists) if user_features else None
        sizes = (tuple(user_features), device, num_tasks, features, regressions)
        self.head = RankerHead(config, items_dim, sid, *sizes)

    def forward(self, batch: RankBatch) -> tuple[Tensor, RankerOutput]:
        """Loss and predictions.

        Returns:
            The weighted sum over tasks of the (weighted) mean loss over this batch's targets, of all processes, that have the task's
            label: logistic, and squared of a regression, in units of its variance in training; scaled so that the mean over processes (which is what data parallelism takes of gradients)
            is the loss of the whole batch. And the predictions.
        """
        return self.rank(batch, self.items(batch.items))

    def rank(self, batch: RankBatch, items: Tensor | None) -> tuple[Tensor, RankerOutput]:
        """Loss and predictions, given what the arm's module gave."""
        users = None if self.users is None else self.users(batch.users)
        return self.head(batch, items, users)


def user_tables(
    user_features: dict[str, int], dim: int, device: torch.device, lists: tuple[str, ...] = ()
) -> EmbeddingBagCollection:
    """One table per user feature; zero at the start, so that the result does not depend on how it is sharded.

    A list is read as the mean of its values' rows, not their sum: so a long list does not outweigh what else is known of a user.
    """
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=escape(f"user_{name}"),
                embedding_dim=dim,
                num_embeddings=size,
                feature_names=[name],
                pooling=PoolingType.MEAN if name in lists else PoolingType.SUM,
                init_fn=nn.init.zeros_,
            )
            for name, size in user_features.items()
        ],
        device=device,
    )


class RankerHead(nn.Module):
    """All that follows the tables; dense, replicated."""

    weights_K: Tensor

    def __init__(
        self,
        config: RankerConfig,
        items_dim: int,
        sid: SIDEConfig | None,
        user_features: tuple[str, ...],
        device: torch.device,
        num_tasks: int,
        features: Features | None = None,
        regressions: tuple[Regression, ...] = (),
    ) -> None:
        super().__init__()
        self.features = features or Features()
        self.user_features = user_features
        self.num_tasks = num_tasks
        self.scales = Scales(num_tasks, regressions, device)
        weights = config.weights(self.scales.num_outputs)
        self.register_buffer("weights_K", torch.tensor(weights, device=device), persistent=False)
        actions = num_actions(num_tasks)
        sizes = self.features.sizes

        def make_reader() -> Reader | BlockReader:
            reader = config.reader(sid)(config, items_dim, sid, actions, device, sizes)
            return BlockReader(reader, config, actions, sizes).to(device) if config.blocks else reader

        self.reader: Reader | BlockReader | ApartReader
        if config.histories_by:
            histories = HistoriesBy.feature(config.histories_by, self.features)
            self.reader = ApartReader([make_reader() for _ in range(histories.count)], histories)
        else:
            self.reader = make_reader()
        known = [feature.size for feature in self.features.known]
        pools = self.reader.num_pools
        sizes_of = (pools, len(user_features), num_tasks, known, self.scales.num_outputs)
        self.interaction = Interaction(config, *sizes_of).to(device)

    def forward(self, batch: RankBatch, items: Tensor | None, users: KeyedTensor | None) -> tuple[Tensor, RankerOutput]:
        """See ``Ranker``; ``items`` is what the arm's module gave."""
        targets = Targets.of(batch)
        q_SD, pooled_SPD = self.reader(batch, items, targets)
        context = Context.of(batch, targets, self.num_tasks)
        # by name: the order of a KeyedTensor's values is that of the shards
        users_SD = [users[name][targets.row_S] for name in self.user_features] if users is not None else []
        # what is not known of a target before its labels must not be read of it
        known_SF = batch.features_NF[targets.event_S, : len(self.features.known)]
        output_SK = self.interaction(q_SD, pooled_SPD, context, users_SD, known_SF)

        digit_ST = _labels(batch.action_N[targets.event_S], self.num_tasks)
        value_SR = batch.values_NR[targets.event_S]
        label_ST = (digit_ST == 1).to(output_SK.dtype)
        weight_S = batch.weight_B[targets.row_S] * batch.weight_N[targets.event_S]
        weight_SK = weight_S.unsqueeze(1) * torch.cat([digit_ST != UNKNOWN, ~value_SR.isnan()], dim=1)
        logit_ST, weight_ST = output_SK[:, : self.num_tasks], weight_SK[:, : self.num_tasks]
        loss_ST = F.binary_cross_entropy_with_logits(logit_ST, label_ST, weight=weight_ST, reduction="none")
        loss_SR = self.scales.errors(output_SK, value_SR) * weight_SK[:, self.num_tasks :]
        loss_K = torch.cat([loss_ST.sum(0), loss_SR.sum(0)])
        means_K = loss_K / batch.global_labels_K.clamp_min(_LEAST_WEIGHT)  # a batch may have no label of a task
        return (means_K * self.weights_K).sum() * _world_size(), RankerOutput(
            prediction=self.scales(output_SK.detach()),
            label=torch.cat([label_ST, value_SR.nan_to_num()], dim=1),
            weight=weight_SK,
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
        return Context.of_counts(
            order_S=order_S,
            time_S=time_S,
            last_S=last_time(time_V, end_S),
            reads_S=end_S > begin_S,
            labels_S2K=count_labels(action_V, begin_S, end_S, num_tasks),
        )

    @staticmethod
    def of_counts(*, order_S: Tensor, time_S: Tensor, last_S: Tensor, reads_S: Tensor, labels_S2K: Tensor) -> "Context":
        """The context of targets, each with the last time and the labels of the events it reads, if it reads any.

        Args:
            order_S, time_S: of the targets, int64.
            last_S: int64; anything where a target reads nothing.
            reads_S: bool.
            labels_S2K: as ``count_labels`` has them.
        """
        negative_SK, positive_SK = labels_S2K.unbind(1)
        return Context(
            count_S=gap_bucket(order_S),
            gap_S=torch.where(reads_S, gap_bucket(time_S - last_S), GAP_BUCKETS - 1),
            log_odds_SK=((positive_SK + 1) / (negative_SK + 1)).log(),
        )


def count_labels(action_V: Tensor, begin_S: Tensor, end_S: Tensor, num_tasks: int) -> Tensor:
    """Negatives and positives of each task among events begin .. end - 1, int64 [S, 2, K]."""
    label_VK = _labels(action_V, num_tasks)
    # both in one number, for what is summed up is as long as the histories
    both_VK = (label_VK == 0).long() + ((label_VK == 1).long() << _HALF)
    sum_VK = F.pad(both_VK.cumsum(0), (0, 0, 1, 0))
    both_SK = sum_VK[end_S] - sum_VK[begin_S]
    return torch.stack([both_SK & ((1 << _HALF) - 1), both_SK >> _HALF], dim=1)


def last_time(time_V: Tensor, end_S: Tensor) -> Tensor:
    """The time of the event before each end, int64 [S]; 0 before the first."""
    return F.pad(time_V, (1, 0))[end_S]


class Interaction(nn.Module):
    """From a target's features to its outputs: a logit of each task, and what ``Scales`` makes values of.

    Args:
        config: sizes.
        num_pools: P, vectors that are pooled for each target.
        num_user_features: of users.
        num_tasks: whose log-odds in the history are read.
        features: number of codes of each feature that is known of a target.
        num_outputs: K; None for ``num_tasks``.
    """

    first_F: Tensor

    def __init__(
        self,
        config: RankerConfig,
        num_pools: int,
        num_user_features: int,
        num_tasks: int,
        features: Sequence[int] = (),
        num_outputs: int | None = None,
    ) -> None:
        super().__init__()
        self.count = nn.Embedding(_COUNT_BUCKETS, _CONTEXT_DIM)
        self.gap = nn.Embedding(GAP_BUCKETS, _CONTEXT_DIM)
        width = (1 + 2 * num_pools + num_user_features) * config.dim + (2 + len(features)) * _CONTEXT_DIM + num_tasks
        if features:
            self.features = nn.Embedding(sum(features), _CONTEXT_DIM)
            nn.init.zeros_(self.features.weight)  # so that a code that training does not have says nothing
            first = torch.tensor([0, *accumulate(features)])[:-1]
            self.register_buffer("first_F", first, persistent=False)
        self.cross = LowRankCrossNet(width, config.cross_layers, low_rank=config.dim)
        self.mlp = MLP(width, list(config.head_dims), activation="relu")
        self.logit = nn.Linear(config.head_dims[-1], num_outputs or num_tasks)

    def forward(
        self,
        q_SD: Tensor,
        pooled_SPD: Tensor,
        context: Context,
        users_SD: list[Tensor],
        known_SF: Tensor | None = None,
    ) -> Tensor:
        """Outputs, float [S, K], of targets with vectors ``q_SD`` that pooled ``pooled_SPD`` and have features ``known_SF``."""
        features = [q_SD, pooled_SPD.flatten(1), (q_SD.unsqueeze(1) * pooled_SPD).flatten(1)]
        features += [self.count(context.count_S), self.gap(context.gap_S), context.log_odds_SK, *users_SD]
        if known_SF is not None and known_SF.shape[1]:
            features.append(self.features(known_SF + self.first_F).flatten(1))
        return self.logit(self.mlp(self.cross(torch.cat(features, dim=1))))


def _labels(action_N: Tensor, num_tasks: int) -> Tensor:
    """Each task's label of each event, int64 [N, K]: 0, 1 or UNKNOWN."""
    if not num_tasks:
        return action_N.new_zeros(action_N.shape[0], 0)
    if num_tasks == 1:
        return action_N.unsqueeze(1)  # the label itself; to divide takes long
    return torch.stack([label_of(action_N, task) for task in range(num_tasks)], dim=1)


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
