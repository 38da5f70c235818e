"""What every converter needs: events sorted by user on disk, and sources joined to items."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sidrec_torchrec.data.columns import is_vector, vector_lists, vectors
from sidrec_torchrec.data.embeddings import Embeddings
from sidrec_torchrec.data.event_log import EventLog, write_event_log
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.text_source import HashedTfidf
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path

EVENTS_SCHEMA = pa.schema(
    [
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("timestamp", pa.int64()),
        ("label", pa.int8()),
        ("rating", pa.float32()),
    ]
)

_TEXT_BATCH = 4096


@dataclass
class EventSink:
    """Where a converter of ratings puts its events; made by ``write_sorted_events``."""

    min_rating: float
    log: EventLog
    num_positives: int = 0

    @property
    def num_events(self) -> int:
        return self.log.num_events

    def add(self, user_N: np.ndarray, item_N: np.ndarray, time_N: np.ndarray, rating_N: np.ndarray) -> None:
        """Takes N events; a rating of at least ``min_rating`` makes a positive."""
        label_N = (rating_N >= self.min_rating).astype(np.int8)
        columns = (user_N, item_N, time_N, label_N, rating_N.astype(np.float32))
        self.log.add(dict(zip(EVENTS_SCHEMA.names, columns, strict=True)))
        self.num_positives += int(label_N.sum())


def write_sorted_events(path: Path, min_rating: float, fill: Callable[[EventSink], None]) -> EventSink:
    """Writes an event file of ratings (see ``write_event_log``).

    Args:
        path: the file.
        min_rating: from this rating on the label is 1.
        fill: adds all events to the sink.

    Raises:
        DataError: if there are no events.
    """
    sinks = []

    def fill_log(log: EventLog) -> None:
        sinks.append(EventSink(min_rating, log))
        fill(sinks[0])

    write_event_log(path, EVENTS_SCHEMA, fill_log)
    return sinks[0]


def write_parquet(path: Path, table: pa.Table) -> None:
    """Writes a table, whole or not at all."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def with_sources(items: pa.Table, *, text_dim: int, embeddings: Path | None) -> pa.Table:
    """Adds the sources to a table of items.

    Args:
        items: at least ``item_id`` and ``text``.
        text_dim: width of the source ``text_emb`` made of ``text`` (see ``HashedTfidf``); 0 for none.
        embeddings: more sources, computed elsewhere (see ``read_embeddings``).

    Raises:
        DataError: on a width below 0; see also ``read_embeddings``.
    """
    if text_dim < 0:
        raise DataError(f"text_dim must be at least 0, got {text_dim}")
    columns = {}
    if text_dim:
        columns["text_emb"] = _text_source(items["text"].to_pylist(), text_dim)
    if embeddings is not None:
        columns |= read_embeddings(embeddings, items)
    for name, column in columns.items():
        items = items.append_column(name, column)
    return items


def read_embeddings(path: Path, items: pa.Table) -> dict[str, pa.Array]:
    """Vectors computed elsewhere, as sources aligned with the items; null for an item without one.

    Args:
        path: ``.npy``: floats [num_items, d], in the order of the rows of the items file (convert once without
            embeddings, compute a vector of each row's ``text``, convert again); the source is named like the file.
            ``.parquet``: a key column (``item_id``, or any other column the items have), and one column of float lists
            per source; rows of unknown items are left out.
        items: the items.

    Raises:
        DataError: if the file is missing or of another kind, has another number of rows (.npy) or no key (.parquet),
            repeats a key, or holds a value that is not finite.
    """
    path = Path(path)
    if path.suffix == ".npy":
        return {_source_name(path): _from_npy(path, items.num_rows)}
    if path.suffix == ".parquet":
        return _from_parquet(path, items)
    raise DataError(f"{path}: embeddings come as .npy or .parquet")


def linked_embeddings(path: Path | None, out: Path) -> str:
    """What the schema of ``out`` says to have its sources read from a file that stays where it is: ``DataSchema.embeddings``.

    Args:
        path: Parquet: ``item_id`` and a column of float lists per source, in any order; None for none.
        out: the data folder.

    Raises:
        DataError: if the file has no ``item_id``, or no source.
    """
    if path is None:
        return ""
    embeddings = Embeddings(ParquetTable.open(Path(path)))
    if not embeddings.names():
        raise DataError(f"{path}: no column of float lists; docs/data.md describes sources")
    return os.path.relpath(Path(path).resolve(), out.resolve())


def _text_source(texts: Sequence[str], dim: int) -> pa.Array:
    if not any(re.search(r"\w", text) for text in texts):
        raise DataError("no item has any text; turn the text source off with text_dim 0 and give embeddings")
    embedder = HashedTfidf(dim).fit(texts)
    x_ND = np.concatenate([embedder.transform(texts[i : i + _TEXT_BATCH]) for i in range(0, len(texts), _TEXT_BATCH)])
    return half_vectors(x_ND, np.any(x_ND, axis=1))


def _source_name(path: Path) -> str:
    return re.sub(r"\W", "_", path.stem)


def _from_npy(path: Path, num_items: int) -> pa.Array:
    try:
        x_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a NumPy array: {error}") from error
    if x_ND.ndim != 2 or len(x_ND) != num_items or not np.issubdtype(x_ND.dtype, np.floating):
        raise DataError(
            f"{path}: need floats of shape [{num_items}, d], one row for each row of the items file; got {x_ND.dtype} "
            f"of shape {list(x_ND.shape)}"
        )
    x_ND = np.asarray(x_ND, np.float32)
    check_float16(x_ND, f"{path}: ")
    return half_vectors(x_ND, np.any(x_ND, axis=1))


def _from_parquet(path: Path, items: pa.Table) -> dict[str, pa.Array]:
    opened = ParquetTable.open(path)
    schema = opened.schema
    keys = [name for name in items.column_names if name in schema.names and not is_vector(schema.field(name).type)]
    names = [field.name for field in schema if is_vector(field.type)]
    if not keys or not names:
        raise DataError(
            f"{path}: need a key column (one of {', '.join(items.column_names)}) and a column of float lists; the file "
            f"has {', '.join(schema.names)}"
        )
    table = pa.Table.from_batches([batch for _, batch in opened.batches([keys[0], *names], 1 << 16)]).combine_chunks()
    key = table[keys[0]].cast(items.schema.field(keys[0]).type)
    if pc.count_distinct(key, mode="all").as_py() != len(key):
        raise DataError(f"{path}: column '{keys[0]}' repeats a value; each item needs one row")
    place_N = pc.index_in(items[keys[0]], value_set=key)
    if place_N.null_count == len(place_N):
        raise DataError(f"{path}: column '{keys[0]}' names none of the items")
    return {name: _joined(table[name], place_N, f"{path}: column '{name}', ") for name in names}


def _joined(column: pa.ChunkedArray, place_N: pa.ChunkedArray, where: str) -> pa.Array:
    column = column.combine_chunks()
    widths = pc.drop_null(pc.unique(pc.list_value_length(column))).to_pylist()
    if len(widths) != 1:
        raise DataError(f"{where}vectors of one width needed, found widths {sorted(widths)}")
    x_ND, _, _ = vectors(column, widths[0])
    check_float16(x_ND, where)
    known_N = place_N.is_valid().to_numpy()
    aligned_ND = np.where(known_N[:, None], x_ND[pc.fill_null(place_N, 0).to_numpy()], 0.0)
    return half_vectors(aligned_ND, np.any(aligned_ND, axis=1))


def check_float16(x_ND: np.ndarray, where: str) -> None:
    """Raises DataError if a value is not finite as float16; names the row after ``where``."""
    with np.errstate(over="ignore"):
        finite_N = np.isfinite(x_ND.astype(np.float16)).all(axis=1)
    if not finite_N.all():
        raise DataError(f"{where}row {int(np.argmin(finite_N))}: a value is not finite, or too large for float16")


def half_vectors(x_ND: np.ndarray, present_N: np.ndarray) -> pa.Array:
    """Rows as a source of float16; null where none is present."""
    return vector_lists(x_ND.astype(np.float16), present_N)
