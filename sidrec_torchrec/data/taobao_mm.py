"""TAOBAO-MM (Taobao, of the paper MUSE), from its raw Parquet files, to our format.

Columns as the authors' code documents them (github.com/alimama-tech/MUSE, README.md, utils/preprocess.py and
utils/muse_dataset.py; the files are on huggingface.co/datasets/TaoBao-MM/Taobao-MM, folder ``raw``; arXiv 2512.07216).
They are numbers of features:

- ``129_1`` user, ``130_1`` to ``130_5`` what is known of him, ``150_2_180`` and ``151_2_180`` his up to 1,000
  behaviours, items and their categories, the oldest first (``train_user_features.parquet``,
  ``test_user_features.parquet``);
- ``205`` item, ``206`` category, ``213`` and ``214`` (``item_features.parquet``); ``205_c``: 128 int8, 1/127 each
  (``scl_embedding_int8_p90.parquet``);
- ``label_0``: [0, 1] for a click, [1, 0] for none (``train_samples.parquet``, ``test_samples.parquet``).

The paper says that age, gender, city and province of users, and city and province of items are among them; which number
is which could not be verified, so they keep their numbers. 0 stands for nothing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.catalogue import VectorFile, write_catalogue
from sidrec_torchrec.data.event_log import EventLog, check_user_share, parquet_writer, write_event_log
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, USERS_FILE, DataFolder, DataSchema
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.vocabulary import MAX_CLASSES
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.training.config import JobConfig

HISTORY_END = 10_000
"""The time of every user's last behaviour; clicks and the like of train come a second later, those of test two."""

_USER, _ITEM, _LABEL = "129_1", "205", "label_0"
_HISTORY, _CATEGORIES = "150_2_180", "151_2_180"
_OF_USERS = tuple(f"130_{i}" for i in range(1, 6))
_OF_ITEMS = {"206": "category", "213": "item_213", "214": "item_214"}
_SPLITS = ("train", "test")
_USERS_AT_ONCE = 4096
_ROWS = 1 << 19
_EVENTS = pa.schema(
    [
        *((name, pa.int64()) for name in ("user_id", "item_id", "timestamp")),
        ("label", pa.int8()),
        ("weight", pa.int8()),
        ("kind", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TaobaoMMConfig(JobConfig):
    """What to convert.

    Args:
        input: the folder ``raw``.
        out: where the data folder goes.
        user_share: share of the users that are kept, above 0. All of them have 8 x 10^9 behaviours: begin with 0.01.
    """

    input: Path
    out: Path
    user_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_user_share(self.user_share)


def convert_taobao_mm(config: TaobaoMMConfig) -> dict[str, Any]:
    """Converts TAOBAO-MM: clicks on ads after long histories, with multimodal embeddings.

    The log has an order and no times: a user's behaviours come a second apart and end at ``HISTORY_END``; samples of
    train follow at the next second, those of test one after. Behaviours are positives of weight 0, context that never
    counts as a target; samples have weight 1. Features of events: ``kind`` (behaviour, sample); of items: those of
    ``213`` and ``214`` that can be. Items are those that are met; ``category``, ``scl_emb``. A user of both splits has
    train's behaviours. Memory holds ids and columns of the items, ids of users, and a 64th of the events.

    Returns:
        Counts: ``items``, ``items_without_vector``, ``users``, ``events``, ``samples``, ``label_rate`` of samples.

    Raises:
        DataError: if a file or a column is missing or broken; names file, column and row.
    """
    tables = {name: ParquetTable.open(config.input / f"{name}.parquet") for name in _file_names()}
    for split in _SPLITS:
        tables[f"{split}_user_features"].require_numbers(_USER, *_OF_USERS)
        tables[f"{split}_user_features"].require_numbers(_HISTORY, _CATEGORIES, lists=True)
        tables[f"{split}_samples"].require_numbers(_USER, _ITEM)
        tables[f"{split}_samples"].require_numbers(_LABEL, lists=True)
    tables["item_features"].require_numbers(_ITEM, *_OF_ITEMS)
    vectors = VectorFile(tables["scl_embedding_int8_p90"], _ITEM, "205_c", "scl_emb", scale=1 / 127)
    items, users, counts = _Items(), IdIndex(), {"samples": 0, "positives": 0}

    def fill(log: EventLog) -> None:
        for number, split in enumerate(_SPLITS):
            table = tables[f"{split}_user_features"]
            for first_row, batch in table.batches([_USER, _HISTORY, _CATEGORIES], _USERS_AT_ONCE):
                _add_behaviours(log, table, batch, first_row, items, users)
            table = tables[f"{split}_samples"]
            for first_row, batch in table.batches([_USER, _ITEM, _LABEL], _ROWS):
                samples, positives = _add_samples(log, table, batch, first_row, items, HISTORY_END + 1 + number)
                counts["samples"] += samples
                counts["positives"] += positives

    log = write_event_log(config.out / EVENTS_FILE, _EVENTS, fill, user_share=config.user_share)
    items.describe(tables["item_features"])
    without = write_catalogue(config.out / ITEMS_FILE, items.table(), vectors)
    _write_users(config.out / USERS_FILE, [tables[f"{split}_user_features"] for split in _SPLITS], log)
    schema = DataSchema(event_features=("kind",), item_features=items.features(), event_weight="weight")
    DataFolder(config.out, schema).write_schema()
    return {
        "items": len(items.index),
        "items_without_vector": without,
        "users": len(users),
        "events": log.num_events,
        "samples": counts["samples"],
        "label_rate": counts["positives"] / max(counts["samples"], 1),
    }


def _file_names() -> list[str]:
    of_splits = [f"{split}_{what}" for split in _SPLITS for what in ("samples", "user_features")]
    return [*of_splits, "item_features", "scl_embedding_int8_p90"]


class _Items:
    """Items that are met, and what is known of them: int64 by column, 0 for nothing."""

    def __init__(self) -> None:
        self.index = IdIndex()
        self._columns = {name: np.zeros(1024, np.int64) for name in _OF_ITEMS.values()}

    def add(self, ids: pa.Array, category_N: np.ndarray | None = None) -> None:
        """N items, new or not, and their categories."""
        place_N = self.index.add(ids)
        if (more := len(self.index) - len(self._columns["category"])) > 0:
            for name, column in self._columns.items():
                self._columns[name] = np.append(column, np.zeros(max(more, len(column)), np.int64))
        if category_N is not None:
            self._columns["category"][place_N] = category_N

    def describe(self, table: ParquetTable) -> None:
        """Takes what a file says of those that are met."""
        for first_row, batch in table.batches([_ITEM, *_OF_ITEMS], _ROWS):
            place_N = self.index.find(table.ids(batch, _ITEM, first_row))
            kept = np.flatnonzero(place_N >= 0)
            for theirs, ours in _OF_ITEMS.items():
                self._columns[ours][place_N[kept]] = pc.fill_null(batch.column(theirs), 0).to_numpy()[kept]

    def table(self) -> pa.Table:
        """All of them."""
        count = len(self.index)
        columns = {name: column[:count] for name, column in self._columns.items()}
        known = {name: pa.array(column, mask=column == 0) for name, column in columns.items()}
        return pa.table({"item_id": self.index.ids.cast(pa.int64()), **known})

    def features(self) -> tuple[str, ...]:
        """Columns, but for the category, that have neither no value nor too many."""
        table = self.table()
        names = [name for name in _OF_ITEMS.values() if name != "category"]
        return tuple(name for name in names if 1 <= pc.count_distinct(table[name]).as_py() <= MAX_CLASSES)


def _add_behaviours(
    log: EventLog, table: ParquetTable, batch: pa.RecordBatch, first_row: int, items: _Items, users: IdIndex
) -> None:
    ids = table.ids(batch, _USER, first_row)
    kept = np.flatnonzero(log.is_kept(ids) & (users.find(ids) < 0))
    before = len(users)
    users.add(ids.take(pa.array(kept)))
    if len(users) - before < len(kept):
        raise DataError(f"{table.at(_USER, first_row)} and after: a user has two rows; each user needs one")
    lengths = [pc.fill_null(pc.list_value_length(batch.column(name)), 0).to_numpy() for name in (_HISTORY, _CATEGORIES)]
    if (lengths[0] != lengths[1]).any():
        row = int(np.argmax(lengths[0] != lengths[1]))
        raise DataError(
            f"{table.at(_CATEGORIES, first_row + row)}: {lengths[1][row]} categories of {lengths[0][row]} items in '{_HISTORY}'"
        )
    batch = batch.take(pa.array(kept))
    item_N, category_N = (pc.fill_null(batch.column(name).flatten(), 0).to_numpy() for name in (_HISTORY, _CATEGORIES))
    length_R = lengths[0][kept]
    row_N = np.repeat(np.arange(len(kept)), length_R)
    place_N = np.arange(len(row_N)) - np.repeat(np.cumsum(length_R) - length_R, length_R)
    there = np.flatnonzero(item_N != 0)
    item_ids = pa.array(item_N[there].astype(np.int64))
    items.add(item_ids, category_N[there])
    time_N = HISTORY_END + 1 - length_R[row_N[there]] + place_N[there]
    _add(log, ids.take(pa.array(kept[row_N[there]])), item_ids, time_N, np.ones(len(there), np.int8), "behaviour")


def _add_samples(
    log: EventLog, table: ParquetTable, batch: pa.RecordBatch, first_row: int, items: _Items, time: int
) -> tuple[int, int]:
    """Adds impressions; returns how many, and how many were clicked."""
    ids, item_ids = (table.ids(batch, name, first_row) for name in (_USER, _ITEM))
    label_N2 = _one_hot(table, batch.column(_LABEL), first_row)
    kept = np.flatnonzero(log.is_kept(ids))
    item_ids, label_N = item_ids.take(pa.array(kept)), label_N2[kept, 1]
    items.add(item_ids)
    _add(log, ids.take(pa.array(kept)), item_ids, np.full(len(kept), time), label_N, "sample")
    return len(kept), int(label_N.sum())


def _one_hot(table: ParquetTable, column: pa.Array, first_row: int) -> np.ndarray:
    """Labels, int8 [N, 2]."""
    length_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    bad_N = length_N != 2
    if not bad_N.any():
        label_N2 = pc.fill_null(column.flatten(), -1).to_numpy().reshape(-1, 2).astype(np.int8)
        bad_N = (label_N2.min(axis=1) != 0) | (label_N2.max(axis=1) != 1)
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise DataError(f"{table.at(_LABEL, first_row + row)}: {column[row].as_py()}; a label is [0, 1] or [1, 0]")
    return label_N2


def _add(
    log: EventLog, user_ids: pa.Array, item_ids: pa.Array, time_N: np.ndarray, label_N: np.ndarray, kind: str
) -> None:
    weight_N = np.full(len(time_N), kind == "sample", np.int8)
    kinds = pa.repeat(kind, len(time_N))
    columns = (user_ids, item_ids, time_N, label_N, weight_N, kinds)
    log.add(dict(zip(_EVENTS.names, columns, strict=True)))


def _write_users(path: Path, tables: list[ParquetTable], log: EventLog) -> None:
    """Users that are kept, each once."""
    schema = pa.schema([("user_id", pa.int64()), *((f"user_{name}", pa.int64()) for name in _OF_USERS)])
    written = IdIndex()
    with atomic_path(path) as temporary, parquet_writer(temporary, schema) as writer:
        for table in tables:
            for first_row, batch in table.batches([_USER, *_OF_USERS], _ROWS):
                ids = table.ids(batch, _USER, first_row)
                kept = pa.array(np.flatnonzero(log.is_kept(ids) & (written.find(ids) < 0)))
                written.add(ids.take(kept))
                known = [pc.if_else(pc.equal(batch.column(n), 0), None, batch.column(n)).take(kept) for n in _OF_USERS]
                writer.write_table(pa.table([ids.take(kept), *known], schema=schema))
