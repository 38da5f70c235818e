"""The sequences of each split: made of one bucket of users at a time, written as parts, and counted."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.buckets import EventBuckets, UserEvents
from sidrec_torchrec.data.census import Census
from sidrec_torchrec.data.features import Coder
from sidrec_torchrec.data.negatives import NegativeSampler
from sidrec_torchrec.data.policy import EventCounts
from sidrec_torchrec.data.protocol import Splitter
from sidrec_torchrec.data.regression import Moments
from sidrec_torchrec.data.sequence_files import INDEX_FILE, PartWriter, read_index, write_index
from sidrec_torchrec.data.sequences import Sequence, sequence_schema, to_record_batch
from sidrec_torchrec.data.tasks import DEFAULT_TASKS
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_object, sha256_of, sync_to_disk, write_json
from sidrec_torchrec.part_files import part_path

SPLITS = ("train", "validation", "test")


class SplitCounts(TypedDict):
    """What a split holds.

    Args:
        rows: of its files.
        events: in all rows.
        targets: in all rows.
        labels: by task, targets that have its label.
    """

    rows: int
    events: int
    targets: int
    labels: dict[str, int]


@dataclass(frozen=True)
class BucketSequences:
    """Makes sequences of a bucket of users: a function from Arrow tables to Arrow tables that can be pickled.

    Args:
        buckets: says what columns the log and its users have.
        splitter: says which events go where.
        census: of the whole log.
        coder: of the features of events.
        features: names of those features.
        user_lists: names of the users' features that are lists.
    """

    buckets: EventBuckets
    splitter: Splitter
    census: Census
    coder: Coder
    features: tuple[str, ...] = ()
    user_lists: tuple[str, ...] = ()

    def __call__(self, events: pa.Table, users: pa.Table) -> pa.Table:
        """All rows of these users, with their ``split``.

        Args:
            events: all events of some users, in the order of the log; columns of ``EventBuckets.event_schema``.
            users: those users, if they are known; columns of ``EventBuckets.user_schema``.

        Returns:
            Columns of ``sequence_schema``, and ``split``, a string.
        """
        rows = list(self._cut(self.buckets.users_of(events, users)))
        table = pa.Table.from_batches(
            [to_record_batch([row for _, row in rows], self.schema)] if rows else [], self.schema
        )
        return table.append_column("split", pa.array([split for split, _ in rows], pa.string()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the labels."""
        return self.buckets.tasks if self.buckets.is_labeled else DEFAULT_TASKS

    @property
    def schema(self) -> pa.Schema:
        """Of the rows."""
        return sequence_schema(
            self.buckets.id_type,
            self.features,
            is_weighted=self.buckets.is_weighted,
            regressions=[named.column for named in self.buckets.regressions],
            user_lists=self.user_lists,
        )

    def rows(self, bucket: int, counts: EventCounts | None = None) -> Iterator[tuple[str, Sequence]]:
        """Split and row, of a bucket on disk."""
        return self._cut(self.buckets.users(bucket, counts))

    def _cut(self, users: Iterator[UserEvents]) -> Iterator[tuple[str, Sequence]]:
        config = self.splitter.config
        for user in users:
            for split, events, first_target in self.splitter.split(user):
                sequence = self._sequence(user, events)
                if self._sampler is not None:
                    is_test = split == "test"
                    sequence = self._sampler.add_negatives(sequence, first_target, is_test=is_test, met_items=user.item)
                lengths = {"max_history": config.max_history, "targets_per_row": config.targets_per_row}
                for row in sequence.rows(first_target, **lengths):
                    yield split, row

    @cached_property
    def _sampler(self) -> NegativeSampler | None:
        if self.buckets.is_labeled:
            return None
        return NegativeSampler(self.census, self.splitter.config.negatives, self.splitter.config.seed)

    def _sequence(self, user: UserEvents, events: np.ndarray) -> Sequence:
        weight = user.weight
        return Sequence(
            user_id=user.user_id,
            user_codes=user.codes,
            user_lists=user.lists,
            item=user.item[events],
            action=user.action[events],
            timestamp=user.timestamp[events],
            order=np.arange(len(events), dtype=np.int32),
            visible=np.ones(len(events), bool),
            features=self.coder(user.features[events]),
            weight=np.ones(len(events), np.float32) if weight is None else weight[events].astype(np.float32),
            values=user.values[events].astype(np.float32),
            num_targets=0,
        )


def write_splits(
    folder: Path, known: Path, sequences: BucketSequences, engine: Engine, why_empty: str
) -> tuple[dict[str, SplitCounts], list[Moments]]:
    """Writes every split; returns the counts by split, and what training targets are of each task of regression.

    Args:
        folder: to write into.
        known: folder for what is known of the buckets that are written; those an earlier call has written, of the same log and
            protocol, are not written again.
        sequences: makes them.
        engine: that works on the buckets.
        why_empty: what may be wrong if nothing is left.

    Raises:
        DataError: if nothing is left to train or test on.
    """
    buckets, config = sequences.buckets, sequences.splitter.config
    writing = _Writing(folder, known, sequences)
    for _ in engine.map(writing, range(buckets.count)):
        pass
    totals = {split: _Totals(sequences) for split in SPLITS}
    for bucket in range(buckets.count):
        for split, its in writing.totals(bucket).items():
            totals[split].merge(its)
    for split in SPLITS:
        parts = (part for bucket in range(buckets.count) for part in read_index(writing.index_file(bucket, split)))
        write_index(folder / split / INDEX_FILE, parts)
    for split in ("test",) if config.test_only else ("train", "test"):
        if not totals[split].counts["targets"]:
            raise DataError(f"{buckets.path}: no {split} targets; {why_empty}")
        for task, labels in totals[split].counts["labels"].items():
            if not labels:
                raise DataError(f"{buckets.path}: column '{task}' is null for all {split} targets; leave the task out")
    return {split: its.counts for split, its in totals.items()}, totals["train"].moments


@dataclass(frozen=True)
class _Writing:
    """Writes a bucket's rows, a part for each split, if that has not been done; its share of the index, and counts."""

    folder: Path
    known: Path
    sequences: BucketSequences

    def __call__(self, bucket: int) -> None:
        if self._is_whole(bucket):
            return
        schema, num_tasks = self.sequences.schema, len(self.sequences.tasks)
        writers = {split: PartWriter(self.folder / split, bucket, schema, num_tasks) for split in SPLITS}
        totals = {split: _Totals(self.sequences) for split in SPLITS}
        try:
            for split, row in self.sequences.rows(bucket):
                writers[split].write(row)
                totals[split].add(row)
        finally:
            parts = {split: writer.close() for split, writer in writers.items()}
        for split, part in parts.items():
            write_index(self.index_file(bucket, split), [part])
        for file in self._files(bucket):
            if file.exists():
                sync_to_disk(file)
        known = {"files": self._digests(bucket)} | {split: its.to_json() for split, its in totals.items()}
        write_json(self._known_file(bucket), known, sealed=True)

    def _is_whole(self, bucket: int) -> bool:
        """Whether all that the bucket has is there, as it was written."""
        path = self._known_file(bucket)
        return path.exists() and read_object(path)["files"] == self._digests(bucket)

    def _digests(self, bucket: int) -> list[str | None]:
        return [sha256_of(file) if file.is_file() else None for file in self._files(bucket)]

    def _files(self, bucket: int) -> list[Path]:
        """Its parts, of which those without rows are none, and shares of indices."""
        parts = [part_path(self.folder / split, bucket) for split in SPLITS]
        return [*parts, *(self.index_file(bucket, split) for split in SPLITS)]

    def totals(self, bucket: int) -> dict[str, "_Totals"]:
        """What a bucket that is written has, by split."""
        known = read_object(self._known_file(bucket))
        return {split: _Totals.from_json(self.sequences, known[split]) for split in SPLITS}

    def index_file(self, bucket: int, split: str) -> Path:
        """The bucket's share of a split's index."""
        return self.known / f"{split}-{bucket}.arrow"

    def _known_file(self, bucket: int) -> Path:
        """What is known of the bucket; written last."""
        return self.known / f"{bucket}.json"


class _Totals:
    """Counts rows."""

    def __init__(self, sequences: BucketSequences) -> None:
        regressions = sequences.buckets.regressions
        names = (*sequences.tasks, *(named.column for named in regressions))
        self.counts: SplitCounts = {"rows": 0, "events": 0, "targets": 0, "labels": dict.fromkeys(names, 0)}
        self.moments = [Moments(named) for named in regressions]
        self._num_tasks = len(sequences.tasks)

    def add(self, row: Sequence) -> None:
        """Takes a row."""
        known_KT = row.known(self._num_tasks)
        self._count(1, len(row), row.num_scored(), known_KT.sum(axis=1).tolist())
        for r, own in enumerate(self.moments):
            is_known_T = known_KT[self._num_tasks + r]
            own.add(row.values[row.targets, r][is_known_T], row.weight[row.targets][is_known_T])

    def merge(self, other: "_Totals") -> None:
        """Takes the rows that another has taken."""
        its = other.counts
        self._count(its["rows"], its["events"], its["targets"], list(its["labels"].values()))
        for own, moments in zip(self.moments, other.moments, strict=True):
            own.merge(moments)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        return {"counts": self.counts, "moments": [own.to_json() for own in self.moments]}

    @staticmethod
    def from_json(sequences: BucketSequences, values: dict[str, Any]) -> "_Totals":
        """Those that ``to_json`` told of."""
        own = _Totals(sequences)
        own.counts = values["counts"]
        pairs = zip(sequences.buckets.regressions, values["moments"], strict=True)
        own.moments = [Moments.from_json(named, its) for named, its in pairs]
        return own

    def _count(self, rows: int, events: int, targets: int, labels: list[int]) -> None:
        self.counts["rows"] += rows
        self.counts["events"] += events
        self.counts["targets"] += targets
        for task, count in zip(self.counts["labels"], labels, strict=True):
            self.counts["labels"][task] += count
