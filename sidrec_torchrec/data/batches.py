"""Batches of sequences for the ranker: streamed, shuffled, of rows of like length, the same for any number of processes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from sidrec_torchrec.data.batch_plan import PlannedBatch, Pool, pools
from sidrec_torchrec.data.ids import seed_of
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequence_files import SequenceFiles, open_sequences
from sidrec_torchrec.data.sequences import Sequence


class ItemFeatures(Protocol):
    """What an arm sends with every event."""

    keys: tuple[str, ...]

    def values(self, item_N: np.ndarray) -> Mapping[str, Tensor]:
        """By key, a tensor of N times some width, row after row, for int32 [N] rows of the item file; -1 if missing."""


@dataclass(kw_only=True)
class RankBatch(Pipelineable):
    """B rows with N events in all; jagged, row after row.

    Args:
        items: the arm's features of each event; a key of width w has w values per event.
        users: codes of each row by user feature: one, or as many as its list has.
        user_B: int64, a number that each row's user alone decides; see ``data.ids.seed_of``.
        lengths_B: int64, events of each row.
        num_targets_B: int64, how many of a row's last events are targets, if they have an item.
        weight_B: float32, 1, or 0 for a row that only fills up a process's share.
        action_N: int64, the labels: with one task 1 for a positive event, 0 for a negative one; see ``data.tasks``.
        weight_N: float32, how much each event counts as a target.
        values_NR: float32, of tasks of regression; NaN where missing.
        features_NF: int64, codes of the events' features; see ``data.features``.
        timestamp_N: int64.
        order_N: int64, place among the user's real events.
        visible_N: bool, whether later events may read this one.
        item_N: int32, rows of the item file; -1 for an event without an item, which is no target.
        global_targets: float32 scalar, targets of this batch over all processes.
        global_labels_K: float32, what those of them weigh together that have a label, by task.
    """

    items: KeyedJaggedTensor
    users: KeyedJaggedTensor
    user_B: Tensor
    lengths_B: Tensor
    num_targets_B: Tensor
    weight_B: Tensor
    action_N: Tensor
    weight_N: Tensor
    values_NR: Tensor
    features_NF: Tensor
    timestamp_N: Tensor
    order_N: Tensor
    visible_N: Tensor
    item_N: Tensor
    global_targets: Tensor
    global_labels_K: Tensor

    def arrays(self) -> dict[str, np.ndarray]:
        """All it holds, by field, and ``items.KEY.values`` and ``items.KEY.lengths``, say, of its jagged features."""
        arrays = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[field.name] = value.numpy()
                continue
            for key, feature in value.to_dict().items():
                arrays[f"{field.name}.{key}.values"] = feature.values().numpy()
                arrays[f"{field.name}.{key}.lengths"] = feature.lengths().numpy()
        return arrays

    @property
    def has_item_N(self) -> Tensor:
        """bool, whether the event has an item."""
        return self.item_N >= 0

    @property
    def side_NC(self) -> Tensor:
        """All that is known of events besides item and time, int64 [N, 1 + F]: action and features."""
        return with_features(self.action_N, self.features_NF)

    def to(self, device: torch.device, non_blocking: bool = False) -> "RankBatch":
        return RankBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)})

    def pin_memory(self) -> "RankBatch":
        return RankBatch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def record_stream(self, stream: torch.Stream) -> None:
        for field in fields(self):
            getattr(self, field.name).record_stream(stream)


def with_features(action_N: Tensor, features_NF: Tensor | None) -> Tensor:
    """Action and features of events as one tensor, int64 [N, 1 + F]."""
    action_N1 = action_N.unsqueeze(1)
    return action_N1 if features_NF is None or not features_NF.shape[1] else torch.cat([action_N1, features_NF], dim=1)


class SequenceBatches(IterableDataset):
    """One pass over a split, as this process's share of each global batch.

    Every process plans the same global batches from the split's index, and reads the row groups it owns: of as many
    processes each reads its share. So a run's result does not depend on their number, and a pass can start in its middle
    (``start_at``).

    Args:
        prepared: the prepared sequences.
        split: ``train``, ``validation`` or ``test``.
        features: the arm's item features.
        batch_events: events per global batch, padding included.
        rank: this process.
        world_size: number of processes.
        shuffle: whether to shuffle row groups, rows and batches, anew for each epoch.
        seed: of the shuffling.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: str,
        features: ItemFeatures,
        *,
        batch_events: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        self.prepared = prepared
        self.split = split
        self.features = features
        self.batch_events = batch_events
        self.rank = rank
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._first = 0
        self._collate = Collator(prepared, features)

    def __iter__(self) -> Iterator[RankBatch]:
        first, self._first = self._first, 0
        rng = np.random.default_rng([self.seed, self.epoch]) if self.shuffle else None
        with open_sequences(self.prepared.path(self.split), (self.rank, self.world_size)) as files:
            for pool in pools(files, rng):
                planned = pool.batches(self.batch_events, rng)
                if first < len(planned):
                    yield from self._read(files, pool, planned[first:])
                first = max(0, first - len(planned))

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Makes the next pass one of ``epoch``, from its global batch number ``batch`` on."""
        self.epoch, self._first = epoch, batch

    def _read(self, files: SequenceFiles, pool: Pool, planned: list[PlannedBatch]) -> Iterator[RankBatch]:
        own = pool.own(self.rank, self.world_size)
        rows = {place: files.rows(pool.groups[place]) for place in own or range(1)}
        spare = next(iter(rows.values()))[:1]
        for batch in planned:
            is_own_B = batch.place_B % self.world_size == self.rank
            places = zip(batch.place_B[is_own_B].tolist(), batch.row_B[is_own_B].tolist(), strict=True)
            share = [rows[place][row] for place, row in places]
            yield self._collate(
                share or spare, weight=1.0 if share else 0.0, targets=batch.targets, labels_K=batch.labels_K
            )


class Collator:
    """Makes a batch of rows.

    Args:
        prepared: says which user features there are, and how many tasks.
        features: the arm's item features.
    """

    def __init__(self, prepared: Prepared, features: ItemFeatures) -> None:
        self.features = features
        self._num_event, self._item_codes = len(prepared.features.event), prepared.item_codes()
        self._user_lists = prepared.user_lists
        self._user_features = [name for name in prepared.user_features if name not in self._user_lists]
        self._num_tasks = len(prepared.tasks)

    def __call__(
        self,
        share: list[Sequence],
        *,
        weight: float = 1.0,
        targets: int | None = None,
        labels_K: np.ndarray | None = None,
    ) -> RankBatch:
        """The batch of this process.

        Args:
            share: its rows, one at least.
            weight: of its rows; see ``RankBatch``.
            targets: those of all processes; None for those of ``share``.
            labels_K: float64, what theirs weigh that have a label; None likewise.
        """
        if targets is None:
            targets = sum(row.num_scored() for row in share)
        if labels_K is None:
            labels_K = np.sum([row.label_weights(self._num_tasks) for row in share], axis=0)
        item_N = np.concatenate([row.item for row in share])
        lengths_B = torch.tensor([len(row) for row in share])
        return RankBatch(
            items=self._items(item_N, lengths_B),
            users=self._users(share),
            user_B=torch.tensor([seed_of(row.user_id) for row in share]),
            lengths_B=lengths_B,
            num_targets_B=torch.tensor([row.num_targets for row in share]),
            weight_B=torch.full((len(share),), weight),
            action_N=_jagged([row.action for row in share], np.int64),
            weight_N=_jagged([row.weight for row in share], np.float32),
            values_NR=_jagged([row.values for row in share], np.float32),
            features_NF=self._features(share, item_N),
            timestamp_N=_jagged([row.timestamp for row in share], np.int64),
            order_N=_jagged([row.order for row in share], np.int64),
            visible_N=_jagged([row.visible for row in share], np.bool_),
            item_N=torch.from_numpy(item_N),
            global_targets=torch.tensor(float(targets)),
            global_labels_K=torch.from_numpy(labels_K).float(),
        )

    def _features(self, rows: list[Sequence], item_N: np.ndarray) -> Tensor:
        """Codes in the order of ``Features.all``; those of a missing item are 0."""
        codes_NF = np.concatenate([row.features for row in rows])
        if self._item_codes is not None:
            of_items_NF = self._item_codes[item_N] * (item_N >= 0)[:, None]
            events = self._num_event
            codes_NF = np.concatenate([codes_NF[:, :events], of_items_NF, codes_NF[:, events:]], axis=1)
        return torch.from_numpy(codes_NF.astype(np.int64))

    def _items(self, item_N: np.ndarray, lengths_B: Tensor) -> KeyedJaggedTensor:
        values = self.features.values(item_N)
        flat = [values[key].reshape(-1) for key in self.features.keys]
        lengths = [lengths_B * (len(v) // len(item_N)) for v in flat]
        return KeyedJaggedTensor(
            keys=list(self.features.keys),
            values=torch.cat(flat) if flat else torch.zeros(0),
            lengths=torch.cat(lengths) if lengths else torch.zeros(0, dtype=torch.int64),
            stride=len(lengths_B),
        )

    def _users(self, rows: list[Sequence]) -> KeyedJaggedTensor:
        codes_FB = np.stack([row.user_codes for row in rows], axis=1).astype(np.int64)
        lists = [row.user_lists[f] for f in range(len(self._user_lists)) for row in rows]
        lengths = np.concatenate([np.ones(codes_FB.size, np.int64), np.array([len(own) for own in lists], np.int64)])
        return KeyedJaggedTensor(
            keys=[*self._user_features, *self._user_lists],
            values=_jagged([codes_FB.reshape(-1), *lists], np.int64),
            lengths=torch.from_numpy(lengths),
            stride=len(rows),
        )


def _jagged(arrays: list[np.ndarray], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate(arrays).astype(dtype, copy=False))
