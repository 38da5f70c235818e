"""The sequences of each split, written as files and counted."""

from collections.abc import Iterable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.buckets import EventBuckets, UserEvents
from sidrec_torchrec.data.features import Coder, Draft, Features
from sidrec_torchrec.data.negatives import NegativeSampler
from sidrec_torchrec.data.protocol import Census, Splitter
from sidrec_torchrec.data.regression import Moments
from sidrec_torchrec.data.sequences import Sequence, sequence_schema, to_record_batch
from sidrec_torchrec.data.tasks import DEFAULT_TASKS, RegressionName
from sidrec_torchrec.errors import DataError

SPLITS = ("train", "validation", "test")
ROW_GROUP = 256  # rows of a sequences file read at once


class SplitCounts(TypedDict):
    """What a split holds.

    Args:
        rows: of its file.
        events: in all rows.
        targets: in all rows.
        labels: by task, targets that have its label.
    """

    rows: int
    events: int
    targets: int
    labels: dict[str, int]


def write_splits(
    folder: Path,
    buckets: EventBuckets,
    splitter: Splitter,
    census: Census,
    drafts: list[Draft],
    features: Features,
    is_weighted: bool,
    user_lists: tuple[str, ...] = (),
) -> tuple[dict[str, SplitCounts], list[Moments]]:
    """Writes every split; returns the counts by split, and what training targets are of each task of regression.

    Args:
        folder: to write into.
        buckets: the log by user.
        splitter: says which events go where.
        census: of the log.
        drafts: of the features of events.
        features: those features.
        is_weighted: whether events have weights.
        user_lists: names of the users' features that are lists.

    Raises:
        DataError: if nothing is left to train or test on.
    """
    config = splitter.config
    sampler = None
    if not buckets.is_labeled:
        sampler = NegativeSampler(census, config.negatives, config.seed)
    tasks = buckets.tasks if buckets.is_labeled else DEFAULT_TASKS
    schema = sequence_schema(
        buckets.id_type,
        features.columns,
        is_weighted=is_weighted,
        regressions=[named.column for named in buckets.regressions],
        user_lists=user_lists,
    )
    coder = Coder(drafts, features.of_log)
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(
                closing(_SplitWriter(folder / f"{split}.parquet", tasks, buckets.regressions, schema))
            )
            for split in SPLITS
        }
        for user in buckets.users():
            for split, events, first_target in splitter.split(user):
                sequence = _sequence(user, events, coder)
                if sampler is not None:
                    is_test = split == "test"
                    sequence = sampler.add_negatives(sequence, first_target, is_test=is_test, met_items=user.item)
                writers[split].write(
                    sequence.rows(first_target, max_history=config.max_history, targets_per_row=config.targets_per_row)
                )
    for split in ("test",) if config.test_only else ("train", "test"):
        if not writers[split].counts["targets"]:
            raise DataError(f"{buckets.path}: no {split} targets; {buckets.counts.why_so_few(config.policy)}")
        for task, labels in writers[split].counts["labels"].items():
            if not labels:
                raise DataError(f"{buckets.path}: column '{task}' is null for all {split} targets; leave the task out")
    return {split: writer.counts for split, writer in writers.items()}, writers["train"].moments


def _sequence(user: UserEvents, events: np.ndarray, coder: Coder) -> Sequence:
    return Sequence(
        user_id=user.user_id,
        user_codes=user.codes,
        user_lists=user.lists,
        item=user.item[events],
        action=user.action[events],
        timestamp=user.timestamp[events],
        order=np.arange(len(events), dtype=np.int32),
        visible=np.ones(len(events), bool),
        features=coder(user.features[events]),
        weight=np.ones(len(events), np.float32) if user.weight is None else user.weight[events].astype(np.float32),
        values=user.values[events].astype(np.float32),
        num_targets=0,
    )


class _SplitWriter:
    """Writes rows to a sequences file, a row group at a time, and counts them."""

    def __init__(
        self, path: Path, tasks: tuple[str, ...], regressions: tuple[RegressionName, ...], schema: pa.Schema
    ) -> None:
        names = (*tasks, *(named.column for named in regressions))
        self.counts: SplitCounts = {"rows": 0, "events": 0, "targets": 0, "labels": dict.fromkeys(names, 0)}
        self.moments = [Moments(named) for named in regressions]
        self._num_tasks = len(tasks)
        self._schema = schema
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd", write_page_checksum=True)
        self._pending: list[Sequence] = []

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def write(self, rows: Iterable[Sequence]) -> None:
        for row in rows:
            self.counts["rows"] += 1
            self.counts["events"] += len(row)
            self.counts["targets"] += row.num_scored()
            known_KT = row.known(self._num_tasks)
            for task, known_T in zip(self.counts["labels"], known_KT, strict=True):
                self.counts["labels"][task] += int(known_T.sum())
            for r, own in enumerate(self.moments):
                is_known_T = known_KT[self._num_tasks + r]
                own.add(row.values[row.targets, r][is_known_T], row.weight[row.targets][is_known_T])
            self._pending.append(row)
            if len(self._pending) == ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(to_record_batch(self._pending, self._schema))
            self._pending = []
