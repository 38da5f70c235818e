"""Users' sequences: rows of ``sequences`` Parquet files, each a stretch of one user's events with its targets.

A row holds a user's events in order; the last ``num_targets`` of them are the row's targets, the ones before are
context only. Every target may read each *visible* event whose ``order`` is smaller than its own, so one pass over a row
trains on many positions. A negative shares its positive's order and is not visible: it can be a target, never history.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.tasks import UNKNOWN, label_of

SEQUENCE_COLUMNS = {
    "item": pa.int32(),
    "action": pa.int8(),
    "timestamp": pa.int64(),
    "order": pa.int32(),
    "visible": pa.bool_(),
}
EVENT_ARRAYS = (*SEQUENCE_COLUMNS, "features", "weight", "values")
_FEATURE, _VALUE, _LIST = (
    "feature.",
    "value.",
    "user.",
)  # how columns of features begin, of regressions, and of users' lists
_NUMPY_TYPES = {
    "item": np.int32,
    "action": np.int8,
    "timestamp": np.int64,
    "order": np.int32,
    "visible": np.bool_,
}


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Events of one user, in order; N events.

    Args:
        user_id: whose.
        user_codes: int32 [F], the user's value code in each user feature that is no list.
        item: int32 [N], rows of the item file; -1 of an event without an item, which is never a target.
        action: int8 [N], the labels: with one task 1 for a positive event, 0 for a negative one; see ``data.tasks``.
        timestamp: int64 [N].
        order: int32 [N], position among the user's real events.
        visible: bool [N], whether later events may read this one.
        features: int16 [N, F], codes of the events' features; see ``data.features``.
        weight: float32 [N], how much each counts as a target.
        values: float32 [N, R], of tasks of regression; NaN where missing.
        num_targets: how many of the last events are targets; of those, events without an item are passed over.
        user_lists: int16, codes of each user feature that is a list; see ``data.user_lists``.
    """

    user_id: int | str | bytes
    user_codes: np.ndarray
    item: np.ndarray
    action: np.ndarray
    timestamp: np.ndarray
    order: np.ndarray
    visible: np.ndarray
    features: np.ndarray
    weight: np.ndarray
    values: np.ndarray
    num_targets: int
    user_lists: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.item)

    def num_scored(self) -> int:
        """How many of the targets have an item."""
        return int((self.item[len(self) - self.num_targets :] >= 0).sum())

    @property
    def targets(self) -> slice:
        """Places of the targets."""
        return slice(len(self) - self.num_targets, None)

    def known(self, num_tasks: int) -> np.ndarray:
        """Which targets have an item, and a label: bool [num_tasks + R, T], by task, those of regression last."""
        targets = self.targets
        action_T, value_TR, has_item_T = self.action[targets], self.values[targets], self.item[targets] >= 0
        known_KT = np.empty((num_tasks + value_TR.shape[1], len(action_T)), bool)
        for task in range(num_tasks):
            known_KT[task] = (label_of(action_T, task) != UNKNOWN) & has_item_T
        for r in range(value_TR.shape[1]):
            known_KT[num_tasks + r] = ~np.isnan(value_TR[:, r]) & has_item_T
        return known_KT

    def label_weights(self, num_tasks: int) -> np.ndarray:
        """What the targets weigh together that ``known`` has, float64 [num_tasks + R]."""
        weight_T = self.weight[self.targets]
        return np.array([weight_T[known_T].sum(dtype=np.float64) for known_T in self.known(num_tasks)])

    def slice(self, start: int, stop: int, num_targets: int) -> "Sequence":
        """Events start..stop of this sequence, the last ``num_targets`` of which are targets."""
        events = {name: getattr(self, name)[start:stop] for name in EVENT_ARRAYS}
        return Sequence(
            user_id=self.user_id,
            user_codes=self.user_codes,
            user_lists=self.user_lists,
            num_targets=num_targets,
            **events,
        )

    def rows(self, first_target: int, *, max_history: int, targets_per_row: int) -> Iterator["Sequence"]:
        """Cuts the events from ``first_target`` on into rows of at most ``targets_per_row`` targets.

        Each row carries up to ``max_history`` events before its first target. A row none of whose targets has an item is
        left out.
        """
        for start in range(first_target, len(self), targets_per_row):
            stop = min(start + targets_per_row, len(self))
            if (self.item[start:stop] >= 0).any():
                yield self.slice(max(0, start - max_history), stop, stop - start)


def sequence_schema(
    id_type: pa.DataType,
    features: Iterable[str] = (),
    *,
    is_weighted: bool = False,
    regressions: Iterable[str] = (),
    user_lists: Iterable[str] = (),
) -> pa.Schema:
    """Columns of a sequences file.

    Args:
        id_type: canonical, of its users' ids.
        features: names of the events' features.
        is_weighted: whether events have weights.
        regressions: names of the numbers to be predicted.
        user_lists: names of the users' features that are lists.
    """
    return pa.schema(
        [
            ("user_id", id_type),
            ("user_codes", pa.list_(pa.int32())),
            *((name, pa.list_(kind)) for name, kind in SEQUENCE_COLUMNS.items()),
            *((f"{_FEATURE}{name}", pa.list_(pa.int16())) for name in features),
            *([("weight", pa.list_(pa.float32()))] if is_weighted else []),
            *((f"{_VALUE}{name}", pa.list_(pa.float32())) for name in regressions),
            *((f"{_LIST}{name}", pa.list_(pa.int16())) for name in user_lists),
            ("num_targets", pa.int32()),
        ]
    )


def to_record_batch(rows: list[Sequence], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as one Arrow batch of ``sequence_schema``."""

    def lists(values: list[np.ndarray], kind: pa.DataType) -> pa.Array:
        offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), kind))

    num_features, num_values, num_lists = (
        sum(name.startswith(kind) for name in schema.names) for kind in (_FEATURE, _VALUE, _LIST)
    )
    columns = [
        pa.array([row.user_id for row in rows], schema.field("user_id").type),
        lists([row.user_codes for row in rows], pa.int32()),
        *(lists([getattr(row, name) for row in rows], kind) for name, kind in SEQUENCE_COLUMNS.items()),
        *(lists([row.features[:, f] for row in rows], pa.int16()) for f in range(num_features)),
        *([lists([row.weight for row in rows], pa.float32())] if "weight" in schema.names else []),
        *(lists([row.values[:, r] for row in rows], pa.float32()) for r in range(num_values)),
        *(lists([row.user_lists[f] for row in rows], pa.int16()) for f in range(num_lists)),
        pa.array([row.num_targets for row in rows], pa.int32()),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def from_table(table: pa.Table) -> list[Sequence]:
    """Rows of a table of ``sequence_schema``; the arrays are views of it where Arrow allows."""
    table = table.combine_chunks()
    names = ["user_codes", *SEQUENCE_COLUMNS]
    columns: dict[str, list] = {name: _split(table.column(name), _NUMPY_TYPES.get(name, np.int32)) for name in names}
    for field, kind, dtype in (("features", _FEATURE, np.int16), ("values", _VALUE, np.float32)):
        parts = [_split(table.column(name), dtype) for name in table.schema.names if name.startswith(kind)]
        columns[field] = [
            np.stack(own, axis=1) if own else np.zeros((len(item_N), 0), dtype)
            for item_N, *own in zip(columns["item"], *parts, strict=True)
        ]
    if "weight" in table.schema.names:
        columns["weight"] = _split(table.column("weight"), np.float32)
    else:
        columns["weight"] = [np.ones(len(item_N), np.float32) for item_N in columns["item"]]
    lists = [_split(table.column(name), np.int16) for name in table.schema.names if name.startswith(_LIST)]
    columns["user_lists"] = list(zip(*lists, strict=True)) if lists else [()] * table.num_rows
    user_ids = table.column("user_id").to_pylist()
    num_targets = table.column("num_targets").to_pylist()
    return [
        Sequence(
            user_id=user_ids[i],
            num_targets=num_targets[i],
            **{name: values[i] for name, values in columns.items()},
        )
        for i in range(table.num_rows)
    ]


def _split(column: pa.ChunkedArray, dtype: type) -> list[np.ndarray]:
    if not len(column):
        return []
    array = column.chunk(0) if column.num_chunks else column.combine_chunks()
    offsets = array.offsets.to_numpy()
    values = array.values.to_numpy(zero_copy_only=False).astype(dtype, copy=False)
    return [values[start:stop] for start, stop in pairwise(offsets)]
