"""KuaiRand (Kuaishou), from its CSV files, to our format.

Columns as the authors' README documents them (github.com/chongminggao/KuaiRand, "Data Descriptions", which was read in
full): ``log_standard_*.csv`` and ``log_random_*.csv``; ``user_features_*.csv``; ``video_features_basic_*.csv``. What
``video_features_statistic_*.csv`` holds is counted over the same month as the logs, the future of most events among it:
it is not read.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.conversion import linked_embeddings, write_parquet
from sidrec_torchrec.data.csv_files import csv_batches
from sidrec_torchrec.data.event_log import EventLog, check_user_share, parquet_writer, write_event_log
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, USERS_FILE, DataFolder, DataSchema
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.training.config import JobConfig

LABELS = (
    *("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"),
    "is_profile_enter",
)
_AFTERWARDS = ("play_time_ms", "profile_stay_time", "comment_stay_time")
_IDS = ("user_id", "video_id", "time_ms")
_LOG = (*_IDS, "hourmin", *LABELS, *_AFTERWARDS, "is_rand", "tab")
_EVENTS = pa.schema(
    [
        *((name, pa.int64()) for name in ("user_id", "item_id", "timestamp")),
        *((name, pa.int8()) for name in ("label", *LABELS, "is_rand", "tab", "hour")),
        *((name, pa.int64()) for name in _AFTERWARDS),
    ]
)
_TEXT_OF_VIDEOS = ("video_type", "upload_type", "music_type")
_ITEMS = pa.schema(
    [
        ("item_id", pa.int64()),
        ("author_id", pa.int64()),
        *((name, pa.string()) for name in _TEXT_OF_VIDEOS),
        ("upload_dt", pa.date32()),
        ("video_duration", pa.float64()),
        ("tags", pa.list_(pa.string())),
    ]
)
_COUNTS_OF_USERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_TEXT_OF_USERS = ("user_active_degree", *(f"{name}_range" for name in _COUNTS_OF_USERS))
_FLAGS_OF_USERS = (
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    *(f"onehot_feat{i}" for i in range(18)),
)


@dataclass(frozen=True, kw_only=True)
class KuaiRandConfig(JobConfig):
    """What to convert.

    Args:
        input: the folder ``data`` of KuaiRand-Pure, -1K or -27K, unpacked.
        out: where the data folder goes.
        embeddings: Parquet of ``item_id`` (KuaiRand's ``video_id``) and a column of float lists per source; it stays
            where it is. KuaiRand has no content: without, what users do is all that tells items apart.
        label: which of the log's signals becomes ``label``; the others are tasks that can be named.
        randomly_shown: whether videos that were shown at random, whatever the user likes, are events too.
        user_share: share of the users that are kept, above 0.
    """

    input: Path
    out: Path
    embeddings: Path | None = None
    label: str = "is_click"
    randomly_shown: bool = True
    user_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_user_share(self.user_share)
        if self.label not in LABELS:
            raise ValueError(f"label must be one of {', '.join(LABELS)}, got {self.label}")


def convert_kuairand(config: KuaiRandConfig) -> dict[str, Any]:
    """Converts KuaiRand: views of short videos with eight labels.

    Events keep all labels, 0 or 1. Features of events: ``tab``, ``hour``; known afterwards: ``play_time_ms``; of items:
    ``video_duration``, ``video_type``, ``upload_type``. Targets of items: the last two, ``tags``, ``music_type``. Times
    are milliseconds. Items are those that are met. Memory holds their ids, and a 64th of the events.

    Returns:
        Counts: ``items``, ``items_without_features``, ``users``, ``events``, ``label_rate``.

    Raises:
        DataError: if a file or a column is missing or broken; names file, column and line.
    """
    files = _files(config.input, "log_standard_*.csv")
    if config.randomly_shown:
        files += _files(config.input, "log_random_*.csv")
    of_videos, of_users = (
        _files(config.input, "video_features_basic_*.csv"),
        _files(config.input, "user_features_*.csv"),
    )
    linked = linked_embeddings(config.embeddings, config.out)
    items, num_positives = IdIndex(), 0

    def fill(log: EventLog) -> None:
        nonlocal num_positives
        for path in files:
            num_positives += _add(log, items, path, config.label)

    log = write_event_log(config.out / EVENTS_FILE, _EVENTS, fill, user_share=config.user_share)
    without = _write_items(config.out / ITEMS_FILE, items, of_videos)
    users = _users(of_users)
    users = users.filter(pa.array(log.is_kept(users["user_id"])))
    write_parquet(config.out / USERS_FILE, users)
    schema = DataSchema(
        embeddings=linked,
        time_unit="ms",
        event_features=("tab", "hour"),
        item_features=("video_duration:dense", "video_type", "upload_type"),
        history_features=("play_time_ms:dense",),
    )
    DataFolder(config.out, schema).write_schema()
    return {
        "items": len(items),
        "items_without_features": without,
        "users": users.num_rows,
        "events": log.num_events,
        "label_rate": num_positives / log.num_events,
    }


def _files(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"{folder}: no file {pattern}; unpack KuaiRand and name its folder 'data'")
    return found


def _add(log: EventLog, items: IdIndex, path: Path, label: str) -> int:
    """Adds a file's events; returns how many are positive."""
    num_positives = 0
    for line, batch in csv_batches(path, dict.fromkeys(_LOG, pa.int64()), required=_LOG):
        for name in (*LABELS, "is_rand"):
            _check_signal(path, name, batch.column(name), line)
        batch = batch.take(pa.array(np.flatnonzero(log.is_kept(batch.column("user_id")))))
        columns = {name: batch.column(name) for name in (*LABELS, *_AFTERWARDS, "is_rand", "tab", "user_id")}
        columns |= {"item_id": batch.column("video_id"), "timestamp": batch.column("time_ms"), "label": columns[label]}
        columns["hour"] = pc.divide(batch.column("hourmin"), 100)
        items.add(columns["item_id"])
        log.add(columns)
        num_positives += pc.sum(columns["label"]).as_py() or 0
    return num_positives


def _check_signal(path: Path, name: str, column: pa.Array, line: int) -> None:
    value_N = column.to_numpy()
    bad_N = (value_N != 0) & (value_N != 1)
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise DataError(f"{path}: line {line + row}: column '{name}' is {value_N[row]}; a signal is 0 or 1")


def _write_items(path: Path, items: IdIndex, files: list[Path]) -> int:
    """Those of the videos that are met; returns how many have no row in the files."""
    has_row_N = np.zeros(len(items), bool)
    with atomic_path(path) as temporary, parquet_writer(temporary, _ITEMS) as writer:
        for first, table in _videos(files):
            place_N = items.find(table["item_id"].combine_chunks())
            kept = np.flatnonzero(place_N >= 0)
            new = np.unique(place_N[kept], return_index=True)[1]
            if len(new) < len(kept) or has_row_N[place_N[kept]].any():
                raise DataError(f"{first}: a video_id has two rows; each video needs one")
            has_row_N[place_N[kept]] = True
            writer.write_table(table.take(pa.array(kept)))
        rest = items.ids.take(pa.array(np.flatnonzero(~has_row_N)))
        nothing = [pa.nulls(len(rest), field.type) for field in list(_ITEMS)[1:]]
        writer.write_table(pa.table([rest, *nothing], schema=_ITEMS))
    return int((~has_row_N).sum())


def _videos(files: list[Path]) -> Iterator[tuple[str, pa.Table]]:
    """Where each batch of videos begins, and the batch."""
    types = {"video_id": pa.int64(), "author_id": pa.float64(), "video_duration": pa.float64()}
    types |= dict.fromkeys((*_TEXT_OF_VIDEOS, "upload_dt", "tag"), pa.string())
    for path in files:
        for line, batch in csv_batches(path, types, required=("video_id",)):
            date = pc.strptime(batch.column("upload_dt"), format="%Y-%m-%d", unit="s", error_is_null=True)
            columns = [batch.column("video_id"), _whole(batch.column("author_id"))]
            columns += [batch.column(name) for name in _TEXT_OF_VIDEOS]
            columns += [
                date.cast(pa.date32()),
                batch.column("video_duration"),
                pc.split_pattern(batch.column("tag"), ","),
            ]
            yield f"{path}: line {line} and after", pa.table(columns, schema=_ITEMS)


def _users(files: list[Path]) -> pa.Table:
    """Ranges and flags are categories; counts are numbers, which are features if somebody names them."""
    types = {"user_id": pa.int64(), **dict.fromkeys((*_COUNTS_OF_USERS, *_FLAGS_OF_USERS), pa.float64())}
    types |= dict.fromkeys(_TEXT_OF_USERS, pa.string())
    table = pa.Table.from_batches([b for path in files for _, b in csv_batches(path, types, required=("user_id",))])
    for name in _FLAGS_OF_USERS:
        table = table.set_column(table.column_names.index(name), name, _whole(table[name]))
    return table


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Whole numbers that a file writes as 4 or as 4.0."""
    return pc.floor(column).cast(pa.int64())
