"""Yambda (Yandex Music), from its Parquet files, to our format.

Columns as the data set's card documents them (huggingface.co/datasets/yandex/yambda, "flat"; arXiv 2505.22238):
``listens.parquet`` has ``uid``, ``timestamp``, ``item_id``, ``is_organic``, ``played_ratio_pct`` and
``track_length_seconds``; ``likes.parquet`` and ``dislikes.parquet`` the first four; ``embeddings.parquet`` ``item_id``,
``embed`` and ``normalized_embed``. The card itself could be read in excerpts alone; the columns were checked against
public code that reads the files. Times are seconds since the log's begin, in steps of 5.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.catalogue import VectorFile, write_catalogue
from sidrec_torchrec.data.event_log import EventLog, check_user_share, write_event_log
from sidrec_torchrec.data.features import numbers
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, DataFolder, DataSchema
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import check_at_least
from sidrec_torchrec.training.config import JobConfig

_ROWS = 1 << 19
_COLUMNS = ("uid", "timestamp", "item_id", "is_organic")
_OF_LISTENS = ("played_ratio_pct", "track_length_seconds")
_LABELS = ("label", "listen", "like")
_EVENTS = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", pa.int64()),
        *((name, pa.int8()) for name in _LABELS),
        ("kind", pa.string()),
        ("is_organic", pa.bool_()),
        *((name, pa.float32()) for name in _OF_LISTENS),
    ]
)


@dataclass(frozen=True, kw_only=True)
class YambdaConfig(JobConfig):
    """What to convert.

    Args:
        input: folder of ``listens.parquet`` and, if they are to be events too, ``likes.parquet`` and
            ``dislikes.parquet``; the data set's ``flat/50m``, say.
        out: where the data folder goes.
        embeddings: the data set's ``embeddings.parquet``; none given: items have no content.
        vector: which of its two columns becomes the source ``audio_emb``.
        min_played: percentage of a track from which on it counts as listened to.
        user_share: share of the users that are kept, above 0.
    """

    input: Path
    out: Path
    embeddings: Path | None = None
    vector: Literal["normalized_embed", "embed"] = "normalized_embed"
    min_played: float = 50.0
    user_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "min_played")
        check_user_share(self.user_share)


def convert_yambda(config: YambdaConfig) -> dict[str, Any]:
    """Converts Yambda: listens, likes and dislikes of music, and audio embeddings.

    A listen is an event whose label ``listen`` says whether at least ``min_played`` percent were played; a like or
    dislike is an event of its own, whose label ``like`` says which. The other label is null; ``label`` is the one that
    is there. Unlikes and undislikes are left out. Features of events: ``kind`` (listen, rating), ``is_organic``; known
    afterwards: ``played_ratio_pct``. Items are those that are met. Memory holds their ids and a 64th of the events.

    Returns:
        Counts: ``items``, ``items_without_vector``, ``events``.

    Raises:
        DataError: if a file or a column is missing or broken; names file, column and row.
    """
    items = IdIndex()

    def fill(log: EventLog) -> None:
        _add(log, items, config.input / "listens.parquet", "listen", config.min_played)
        for name, like in (("likes", 1), ("dislikes", 0)):
            if (path := config.input / f"{name}.parquet").exists():
                _add(log, items, path, "rating", like)

    vectors = None
    if config.embeddings is not None:
        vectors = VectorFile(ParquetTable.open(config.embeddings), "item_id", config.vector, "audio_emb")
    log = write_event_log(config.out / EVENTS_FILE, _EVENTS, fill, user_share=config.user_share)
    without = write_catalogue(config.out / ITEMS_FILE, pa.table({"item_id": items.ids.cast(pa.int64())}), vectors)
    schema = DataSchema(event_features=("kind", "is_organic"), history_features=("played_ratio_pct:dense",))
    DataFolder(config.out, schema).write_schema()
    return {"items": len(items), "items_without_vector": without, "events": log.num_events}


def _add(log: EventLog, items: IdIndex, path: Path, kind: str, threshold: float) -> None:
    """Adds a file's events; of ratings the threshold is the label itself."""
    table = ParquetTable.open(path, may_be_empty=kind == "rating")
    names = [*_COLUMNS, *(_OF_LISTENS if kind == "listen" else ())]
    table.require_numbers(*names)
    for first_row, batch in table.batches(names, _ROWS):
        users = table.ids(batch, "uid", first_row)
        kept = np.flatnonzero(log.is_kept(users))
        for name in names:
            table.check_no_null(batch, name, first_row)
        batch, users = batch.take(pa.array(kept)), users.take(pa.array(kept))
        item_ids = table.ids(batch, "item_id", first_row)
        items.add(item_ids)
        columns = {name: batch.column(name) for name in ("timestamp", "is_organic")}
        none = pa.nulls(len(batch), pa.int8())
        labels = dict.fromkeys(_LABELS, none)
        columns |= {name: pa.nulls(len(batch), pa.float32()) for name in _OF_LISTENS}
        if kind == "listen":
            columns |= {name: batch.column(name) for name in _OF_LISTENS}
            labels["listen"] = pa.array((numbers(batch.column("played_ratio_pct")) >= threshold).astype(np.int8))
        else:
            labels["like"] = pa.array(np.full(len(batch), threshold, np.int8))
        labels["label"] = labels["listen" if kind == "listen" else "like"]
        log.add({"user_id": users, "item_id": item_ids, "kind": pa.repeat(kind, len(batch)), **labels, **columns})
