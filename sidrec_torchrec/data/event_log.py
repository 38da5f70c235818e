"""A log from events that come in any order: each user's together, by time; sorted on disk in bounded memory."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.ids import as_ids, canonical, keys
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path

_NUM_BUCKETS = 64
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
_SHARES = 1 << 16


@dataclass
class EventLog:
    """Where a converter puts its events; made by ``write_event_log``.

    Args:
        schema: of the log; has ``user_id`` and ``timestamp``.
        user_share: share of the users that are kept: those whose id hashes below it.
        writers: of the buckets.
    """

    schema: pa.Schema
    user_share: float
    writers: list[pa.ipc.RecordBatchFileWriter]
    num_events: int = 0

    def is_kept(self, user_ids: Any) -> np.ndarray:
        """Whether each of N users is among the share that is kept, bool [N]; the same for an id wherever it is met."""
        if self.user_share >= 1:
            return np.ones(len(user_ids), bool)
        share_N = (_hashed(user_ids) >> np.uint64(16)) % np.uint64(_SHARES)
        return share_N < np.uint64(round(self.user_share * _SHARES))

    def add(self, columns: Mapping[str, Any]) -> None:
        """Takes N events of users that are kept: a numpy or Arrow array by name of a column."""
        arrays = [_typed(columns[field.name], field.type) for field in self.schema]
        batch = pa.RecordBatch.from_arrays(arrays, schema=self.schema)
        bucket_N = (_hashed(batch.column("user_id")) >> np.uint64(40)) % np.uint64(len(self.writers))
        order = np.argsort(bucket_N, kind="stable")
        batch = batch.take(pa.array(order))
        ends = np.searchsorted(bucket_N[order], np.arange(len(self.writers)), side="right").tolist()
        for writer, begin, end in zip(self.writers, [0, *ends], ends, strict=False):
            if end > begin:
                writer.write_batch(batch.slice(begin, end - begin))
        self.num_events += len(batch)


def write_event_log(
    path: Path, schema: pa.Schema, fill: Callable[[EventLog], None], *, user_share: float = 1.0
) -> EventLog:
    """Writes an event file in which each user's events stand together, ordered by time, ties as they came.

    Memory holds one of 64 buckets of users at a time, as ``fill`` holds what it adds; the disk beside ``path`` holds
    all events once more.

    Args:
        path: the file.
        schema: its columns, ``user_id`` and ``timestamp`` among them.
        fill: adds all events to the log.
        user_share: share of the users that are kept, above 0.

    Raises:
        DataError: if there are no events.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        buckets = [Path(folder) / f"{bucket}.arrow" for bucket in range(_NUM_BUCKETS)]
        with ExitStack() as stack:
            writers = [stack.enter_context(pa.ipc.new_file(str(bucket), schema)) for bucket in buckets]
            log = EventLog(schema, user_share, writers)
            fill(log)
        if log.num_events == 0:
            raise DataError(
                f"{path}: not written: no events are left. Is the input empty, min_events too high, or user_share too low?"
            )
        with atomic_path(path) as temporary, parquet_writer(temporary, schema) as writer:
            for bucket in buckets:
                with pa.memory_map(str(bucket)) as file:
                    table = pa.ipc.open_file(file).read_all()
                    if len(table):
                        writer.write_table(table.take(pa.array(_order(table))))
                bucket.unlink()
    return log


def check_user_share(share: float) -> None:
    """Raises ValueError unless it lies in (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"user_share must be above 0 and at most 1, got {share}")


def parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """As every file of ours is written: compressed, with checksums."""
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _order(table: pa.Table) -> np.ndarray:
    users = table["user_id"]
    user_N = (
        users.combine_chunks().dictionary_encode().indices.to_numpy() if not _is_int(users.type) else users.to_numpy()
    )
    return np.lexsort((table["timestamp"].to_numpy(), user_N))


def _is_int(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind)


def _typed(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    return pa.array(values, kind)


def _hashed(user_ids: Any) -> np.ndarray:
    ids = canonical(user_ids) if isinstance(user_ids, pa.Array | pa.ChunkedArray) else as_ids(user_ids)
    return keys(ids).view(np.uint64) * _SPREAD
