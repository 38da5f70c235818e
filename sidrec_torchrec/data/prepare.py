"""From event logs to training, validation and test sequences; the one place that defines the protocol.

Protocol, for every user in the order of their events:

- the last ``test_fraction`` of the events are test targets, which may read every earlier event of the user;
- a random ``cold_fraction`` of the items is removed from training altogether, as targets and as history;
- a random ``validation_fraction`` of the users is left out of training; their training events choose the best epoch;
- of the other users a random ``train_fraction`` is trained on; all users are tested.

An item is *seen* if it occurs in a training sequence; test targets on other items are *cold*.

Logs without labels hold positives only: each event then gets ``negatives`` items, drawn from the events of other users
in the same part (training or test) and the same kind (seen or cold), so that an item's popularity tells nothing about
its label.

Memory is bounded by the largest bucket of users, whatever the number of events: events are first cut into buckets on
disk by a hash of their user.
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.buckets import EventBuckets, UserEvents
from sidrec_torchrec.data.fingerprint import data_fingerprint, file_fingerprint
from sidrec_torchrec.data.format import (
    ITEMS_FILE,
    USERS_FILE,
    Users,
    Vocabulary,
    open_events,
    open_items,
    open_users,
    scan_vocabularies,
)
from sidrec_torchrec.data.item_arrays import map_rows, write_rows
from sidrec_torchrec.data.negatives import NegativeSampler
from sidrec_torchrec.data.parquet import is_multi_label
from sidrec_torchrec.data.sequences import Sequence, from_table, open_sequences, sequence_schema, to_record_batch
from sidrec_torchrec.data.tasks import DEFAULT_TASKS, check_tasks
from sidrec_torchrec.errors import DataError, check_at_least, check_share
from sidrec_torchrec.files import atomic_path, read_json, write_json

SPLITS = ("train", "validation", "test")
PREPARED_FILE, SEEN_FILE = "prepared.json", "seen.npy"
COLD_ITEMS_FILE = "cold_items.parquet"  # ids of the items kept out of training
SEQUENCES = "sequences"  # where the prepare job puts them, in its output folder
ROW_GROUP = 256  # rows of a sequences file read at once


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How logs become sequences.

    Args:
        test_fraction: share of each user's events, the last ones, that are tested on.
        cold_fraction: share of the items removed from training.
        validation_fraction: share of the users whose training events choose the best epoch instead.
        train_fraction: share of the other users that is trained on, to see what less data does; above 0.
        tasks: columns of labels to predict, four at most; none named means ``label``, or, without such a column, whether
            an event is one or a sampled negative.
        negatives: sampled negatives per event, for logs without labels.
        max_history: most context events of a row.
        targets_per_row: most targets of a row.
        seed: of the cold items, the validation users and the negatives.
    """

    test_fraction: float = 0.2
    cold_fraction: float = 0.25
    validation_fraction: float = 0.05
    train_fraction: float = 1.0
    tasks: tuple[str, ...] = ()
    negatives: int = 1
    max_history: int = 512
    targets_per_row: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_share(self, "test_fraction", "cold_fraction", "validation_fraction")
        check_at_least(self, 1, "negatives", "max_history", "targets_per_row")
        check_tasks(self.tasks)
        if not self.test_fraction:
            raise ValueError("test_fraction must be above 0: nothing would be tested")
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"train_fraction must be above 0 and at most 1, got {self.train_fraction}")


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


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A folder of prepared sequences. Made by ``prepare`` or ``open_prepared``.

    Args:
        folder: holds ``train.parquet``, ``validation.parquet``, ``test.parquet``, ``cold_items.parquet``, ``seen.npy`` and
            ``prepared.json``.
        num_items: items in the item file.
        user_features: number of codes by user feature; code 0 stands for a missing value.
        sampled_negatives: whether the negatives were sampled (logs of positives only).
        data: fingerprint of each file of the data folder; see ``data_fingerprint``.
        counts: by split.
        tasks: names of the labels, in the order of an action's digits; see ``data.tasks``.
        max_history: most context events of a row; None if it was prepared by a version that did not say.
        vocabularies: by user feature, the values whose codes are 1, 2, ...; None as above.
    """

    folder: Path
    num_items: int
    user_features: dict[str, int]
    sampled_negatives: bool
    data: dict[str, str]
    counts: dict[str, SplitCounts]
    tasks: tuple[str, ...]
    max_history: int | None = None
    vocabularies: dict[str, list] | None = None

    def files(self) -> list[Path]:
        """Every file that says something of the sequences."""
        return [*(self.path(split) for split in SPLITS), self.folder / SEEN_FILE, self.folder / PREPARED_FILE]

    def seen(self) -> np.ndarray:
        """Whether an item occurs in training, bool [num_items], mapped from disk."""
        return map_rows(self.folder / SEEN_FILE)

    def training_events(self) -> np.ndarray:
        """How many real events training has of each item, int64 [num_items]; sampled negatives are none.

        Raises:
            DataError: if the training sequences are missing, broken or cut short.
        """
        counts = np.zeros(self.num_items, np.int64)
        with open_sequences(self.path("train")) as file:
            for group in range(file.num_row_groups):
                for row in from_table(file.read_row_group(group)):
                    # Its targets alone: the events before them are the targets of the user's other rows.
                    first = len(row) - row.num_targets
                    np.add.at(counts, row.item[first:][row.visible[first:]], 1)
        return counts

    def check_items(self, data: Path) -> None:
        """Refuses another item file than the sequences' rows point into.

        Raises:
            DataError: if ``data``'s items changed since ``prepare``.
        """
        path = Path(data) / ITEMS_FILE
        if not path.exists() or file_fingerprint(path) != self.data[ITEMS_FILE]:
            raise DataError(f"{path}: not the items that {self.folder} was prepared from; prepare this data again")

    def user_values(self, data: Path) -> dict[str, list]:
        """By user feature, the values whose codes are 1, 2, ...; code 0 stands for a missing or unknown value.

        Raises:
            DataError: if an earlier version prepared it, which did not keep them, and ``data``'s users changed since.
        """
        if self.vocabularies is not None:
            return self.vocabularies
        if not self.user_features:
            return {}
        path = Path(data) / USERS_FILE
        if not path.exists() or file_fingerprint(path) != self.data[USERS_FILE]:
            raise DataError(f"{path}: not the users that {self.folder} was prepared from; prepare this data again")
        return {name: list(vocabulary.values) for name, vocabulary in _user_vocabularies(open_users(data)).items()}

    def path(self, split: str) -> Path:
        """The sequences file of ``train``, ``validation`` or ``test``."""
        return self.folder / f"{split}.parquet"


def open_prepared(folder: Path) -> Prepared:
    """Opens what ``prepare`` wrote.

    Args:
        folder: of the sequences, or the prepare job's output folder that holds it.

    Raises:
        DataError: if the folder is not one.
    """
    folder = Path(folder)
    if not (folder / PREPARED_FILE).exists() and (folder / SEQUENCES / PREPARED_FILE).exists():
        folder = folder / SEQUENCES
    path = folder / PREPARED_FILE
    if not path.exists():
        raise DataError(f"{path}: not found; run `sidrec prepare` first, and name its --out")
    values = read_json(path)
    try:
        return Prepared(folder=folder, **values | {"tasks": tuple(values["tasks"])})
    except (KeyError, TypeError) as error:  # other fields, or none
        raise DataError(f"{path}: of another version of sidrec_torchrec ({error!r}); prepare again") from error


def prepare(data: Path, out: Path, config: PrepareConfig) -> Prepared:
    """Splits ``data``'s events into sequences under ``out``.

    Args:
        data: folder of ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet``.
        out: folder to write; appears only when complete.
        config: the protocol.

    Raises:
        DataError: on bad events (names file, column, row), an item that is not in the item file, a user's timestamps
            going backwards, or a protocol that leaves nothing to train or test on.
    """
    items, users = open_items(data, sources=(), targets=()), open_users(data)
    vocabularies = _user_vocabularies(users)
    with atomic_path(out) as folder:
        buckets = EventBuckets.write(folder / "buckets", open_events(data, config.tasks), items, users, vocabularies)
        splitter = _Splitter(config, items.num_items)
        seen, counts = _write_sequences(folder, buckets, splitter, config)
        shutil.rmtree(folder / "buckets")
        write_rows(folder / SEEN_FILE, seen.shape, np.bool_, iter([seen]))
        pq.write_table(
            pa.table({"item_id": items.ids()[splitter.cold]}), folder / COLD_ITEMS_FILE, write_page_checksum=True
        )
        write_json(
            folder / PREPARED_FILE,
            {
                "num_items": items.num_items,
                "user_features": {name: len(vocabulary) + 1 for name, vocabulary in vocabularies.items()},
                "sampled_negatives": not buckets.tasks,
                "tasks": buckets.tasks or DEFAULT_TASKS,
                "data": data_fingerprint(data),
                "counts": counts,
                "max_history": config.max_history,
                "vocabularies": {name: list(vocabulary.values) for name, vocabulary in vocabularies.items()},
            },
        )
    return open_prepared(out)


def _write_sequences(
    folder: Path, buckets: EventBuckets, splitter: "_Splitter", config: PrepareConfig
) -> tuple[np.ndarray, dict[str, SplitCounts]]:
    """Writes every split; returns the seen items, bool [num_items], and the counts by split."""
    train_counts, test_counts = splitter.count_items(buckets)
    sampler = None
    if not buckets.tasks:
        sampler = NegativeSampler(train_counts, test_counts, config.negatives, config.seed)
    tasks = buckets.tasks or DEFAULT_TASKS
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(closing(_SequenceWriter(folder / f"{split}.parquet", tasks))) for split in SPLITS
        }
        for user in buckets.users():
            for split, events, first_target in splitter.split(user):
                sequence = _sequence(user, events)
                if sampler is not None:
                    is_test = split == "test"
                    sequence = sampler.add_negatives(sequence, first_target, is_test=is_test, met_items=user.item)
                writers[split].write(
                    sequence.rows(first_target, max_history=config.max_history, targets_per_row=config.targets_per_row)
                )
    for split in ("train", "test"):
        if not writers[split].counts["targets"]:
            raise DataError(f"{buckets.path}: no {split} targets; the users have too few events for this protocol")
        for task, labels in writers[split].counts["labels"].items():
            if not labels:
                raise DataError(f"{buckets.path}: column '{task}' is null for all {split} targets; leave the task out")
    return train_counts > 0, {split: writer.counts for split, writer in writers.items()}


class _Splitter:
    """The protocol: which of a user's events belong to which split."""

    def __init__(self, config: PrepareConfig, num_items: int) -> None:
        self.config = config
        self.cold = np.zeros(num_items, bool)
        shuffled = np.random.default_rng([config.seed, 0]).permutation(num_items)
        self.cold[shuffled[: int(config.cold_fraction * num_items)]] = True

    def split(self, user: UserEvents) -> Iterator[tuple[str, np.ndarray, int]]:
        """(split, places of the events that belong to it, how many of those precede the first target)."""
        num_events = len(user.item)
        first_test = num_events - round(self.config.test_fraction * num_events)
        kept = np.flatnonzero(~self.cold[user.item[:first_test]])
        if self._draw(1, user.user_id) < self.config.validation_fraction:
            yield "validation", kept, 0
        elif self._draw(2, user.user_id) < self.config.train_fraction:
            yield "train", kept, 0
        yield "test", np.arange(num_events), first_test

    def count_items(self, buckets: EventBuckets) -> tuple[np.ndarray, np.ndarray]:
        """Training events and test targets by item, int64 [num_items] each."""
        counts = {split: np.zeros(len(self.cold), np.int64) for split in SPLITS}
        for user in buckets.users():
            for split, events, first_target in self.split(user):
                np.add.at(counts[split], user.item[events[first_target:]], 1)
        return counts["train"], counts["test"]

    def _draw(self, what: int, user_id: int) -> float:
        """A number in [0, 1), the same for a user whatever the others."""
        return np.random.default_rng([self.config.seed, what, user_id % (1 << 63)]).random()


def _sequence(user: UserEvents, events: np.ndarray) -> Sequence:
    return Sequence(
        user_id=user.user_id,
        user_codes=user.codes,
        item=user.item[events],
        action=user.action[events],
        timestamp=user.timestamp[events],
        order=np.arange(len(events), dtype=np.int32),
        visible=np.ones(len(events), bool),
        num_targets=0,
    )


def _user_vocabularies(users: Users | None) -> dict[str, Vocabulary]:
    """Of the user file's single-valued categorical columns."""
    if users is None:
        return {}
    single = [name for name in users.categorical if not is_multi_label(users.table.type_of(name))]
    return scan_vocabularies(users, single)


class _SequenceWriter:
    """Writes rows to a sequences file, a row group at a time, and counts them."""

    def __init__(self, path: Path, tasks: tuple[str, ...]) -> None:
        self.counts: SplitCounts = {"rows": 0, "events": 0, "targets": 0, "labels": dict.fromkeys(tasks, 0)}
        self._writer = pq.ParquetWriter(path, sequence_schema(), compression="zstd", write_page_checksum=True)
        self._pending: list[Sequence] = []

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def write(self, rows: Iterable[Sequence]) -> None:
        for row in rows:
            self.counts["rows"] += 1
            self.counts["events"] += len(row)
            self.counts["targets"] += row.num_targets
            for k, task in enumerate(self.counts["labels"]):
                self.counts["labels"][task] += row.num_labels(k)
            self._pending.append(row)
            if len(self._pending) == ROW_GROUP:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(to_record_batch(self._pending))
            self._pending = []
