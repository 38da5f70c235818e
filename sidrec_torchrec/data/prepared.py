"""What `prepare` has made of a log: a folder of sequences, and all that is known of them."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.features import Features
from sidrec_torchrec.data.fingerprint import files_fingerprint
from sidrec_torchrec.data.fit_features import write_item_codes
from sidrec_torchrec.data.format import DataFolder, DataSchema
from sidrec_torchrec.data.item_arrays import map_rows
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.data.regression import from_json as regressions_from_json
from sidrec_torchrec.data.splits import SplitCounts
from sidrec_torchrec.data.user_lists import list_names
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import LIST_FILE, read_object
from sidrec_torchrec.processes import made_once
from sidrec_torchrec.storage.mirror import local
from sidrec_torchrec.storage.urls import made_beside

PREPARED_FILE, SEEN_FILE = "prepared.json", "seen.npy"
TRAINING_FILE, FIRST_EVENT_FILE = "training_events.npy", "first_event.npy"
COLD_ITEMS_FILE = "cold_items.parquet"  # ids of the items kept out of training
ITEM_IDS_FILE = "item_ids.parquet"  # ids of all items, in the order of their rows
SEQUENCES = "sequences"  # where the prepare job puts them, in its output folder


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A folder of prepared sequences. Made by ``prepare`` or ``open_prepared``.

    Args:
        folder: holds ``train``, ``validation`` and ``test``, folders of parts, ``cold_items.parquet``, ``seen.npy``,
            ``training_events.npy``, ``first_event.npy``, ``item_ids.parquet`` and ``prepared.json``.
        num_items: items in the item file.
        user_features: number of codes by user feature; code 0 stands for a missing value. Those that are lists come last.
        sampled_negatives: whether the negatives were sampled (logs of positives only).
        data: fingerprints of the data; see ``data_fingerprint``.
        counts: by split.
        tasks: names of the labels, in the order of an action's digits; see ``data.tasks``. Those of regression are none of them.
        max_history: most context events of a row.
        vocabularies: by user feature, the values whose codes are 1, 2, ..., or ``Feature.codes_json``'s; code 0 stands for a missing
            or unknown value.
        policy: what became of events that a log should not have; other logs are read alike.
        schema: what the data's files and columns are called.
        met: how many such events there were; see ``EventCounts.to_json``.
        last_training_event: time of the last training target; None where nothing trains.
        targets_per_row: most targets of a row.
        negatives: sampled negatives per event; None where there are labels.
        profile: counts of what users and test targets are like, for ``data.drift``.
        features: of its events.
        regressions: numbers to be predicted besides.
    """

    folder: Path
    num_items: int
    user_features: dict[str, int]
    sampled_negatives: bool
    data: dict[str, str]
    counts: dict[str, SplitCounts]
    tasks: tuple[str, ...]
    max_history: int
    vocabularies: dict[str, Any]
    policy: EventPolicy = field(default_factory=EventPolicy)
    schema: DataSchema = field(default_factory=DataSchema)
    met: dict[str, dict[str, Any]] = field(default_factory=dict)
    last_training_event: int | None = None
    targets_per_row: int
    negatives: int | None
    profile: dict[str, Any]
    features: Features = field(default_factory=Features)
    regressions: tuple[Regression, ...] = ()

    @property
    def predicted(self) -> tuple[str, ...]:
        """Names of all tasks, in the order of predictions: those of regression come last."""
        return (*self.tasks, *(own.name for own in self.regressions))

    @property
    def named_tasks(self) -> tuple[str, ...]:
        """As ``--tasks`` names them; none where negatives are sampled."""
        return () if self.sampled_negatives else (*self.tasks, *(str(own.named) for own in self.regressions))

    @property
    def user_lists(self) -> tuple[str, ...]:
        """The user features that are lists."""
        return list_names(self.vocabularies)

    def item_codes(self) -> np.ndarray | None:
        """Codes of the items' features, int16 [num_items, F], mapped from disk; None without such features.

        Raises:
            DataError: if ``lay_out_item_codes`` has not been called, or the array is broken.
        """
        return map_rows(self._item_codes) if self.features.item else None

    def lay_out_item_codes(self, data: DataFolder) -> None:
        """Writes ``item_codes``, where they are not yet; on every process.

        Raises:
            DataError: if a column is missing or holds something else than it did in training; names file and column.
        """
        if self.features.item:
            made_once(self._item_codes, partial(write_item_codes, data, self.features.item))

    @property
    def arrays(self) -> Path:
        """The folder of what is laid out by item, to be mapped."""
        return made_beside(self.folder, PREPARED_FILE) / "arrays"

    @property
    def _item_codes(self) -> Path:
        names = json.dumps(self.features.to_json()["item"]).encode()
        return self.arrays / f"item-features-{hashlib.sha256(names).hexdigest()[:16]}.npy"

    def files(self) -> list[Path]:
        """The files that say what the sequences are. Of their parts, which each process checks as it reads them, one has the digests."""
        return [*self.files_beside_sequences(), self.folder / LIST_FILE]

    def files_beside_sequences(self) -> list[Path]:
        """What is known besides, of items, features and tasks."""
        return [
            self.folder / name for name in (SEEN_FILE, TRAINING_FILE, FIRST_EVENT_FILE, ITEM_IDS_FILE, PREPARED_FILE)
        ]

    def seen(self) -> np.ndarray:
        """Whether an item occurs in training, bool [num_items], mapped from disk."""
        return map_rows(self.folder / SEEN_FILE)

    def training_events(self) -> np.ndarray:
        """How many training targets each item has, int64 [num_items], mapped from disk; sampled negatives are none."""
        return map_rows(self.folder / TRAINING_FILE)

    def first_events(self) -> np.ndarray:
        """The time of each item's first event in the whole log, int64 [num_items], the largest int64 without events."""
        return map_rows(self.folder / FIRST_EVENT_FILE)

    def item_ids(self) -> pa.Array:
        """Ids of all items, canonical [num_items], in the order of their rows."""
        return ParquetTable.open(self.folder / ITEM_IDS_FILE).read_unique_ids("item_id")

    def check_items(self, data: DataFolder) -> None:
        """Refuses other items than the sequences' rows point into.

        Raises:
            DataError: if ``data`` has no items, or they changed since ``prepare``.
        """
        if not data.has("items"):
            raise DataError(f"{data.where('items')}: not found; name the data that {self.folder} was prepared from")
        if files_fingerprint(data.files("items")) != self.data.get("items"):
            raise DataError(
                f"{data.where('items')}: not the items that {self.folder} was prepared from; prepare this data again"
            )

    def path(self, split: str) -> Path:
        """The folder of ``train``, ``validation`` or ``test``; see ``data.sequence_files``."""
        return self.folder / split


def open_prepared(folder: Path) -> Prepared:
    """Opens what ``prepare`` wrote.

    Args:
        folder: of the sequences, or the prepare job's output folder that holds it.

    Raises:
        DataError: if the folder is not one.
    """
    folder = local(folder)
    if not (folder / PREPARED_FILE).exists() and (folder / SEQUENCES / PREPARED_FILE).exists():
        folder = folder / SEQUENCES
    path = folder / PREPARED_FILE
    if not path.exists():
        raise DataError(f"{path}: not found; run `sidrec prepare` first, and name its --out")
    values = read_object(path)
    try:
        values["policy"] = EventPolicy(**values.get("policy", {}))
        values["schema"] = DataSchema.from_json(values.get("schema", {}), path)
        values["features"] = Features.from_json(values.get("features", {}))
        values["regressions"] = regressions_from_json(values.get("regressions", []))
        return Prepared(folder=folder, **values | {"tasks": tuple(values["tasks"])})
    except (KeyError, TypeError) as error:  # other fields, or none
        raise DataError(f"{path}: of another version of sidrec_torchrec ({error!r}); prepare again") from error
