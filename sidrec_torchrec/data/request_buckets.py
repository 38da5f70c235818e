"""Requests and the log they are joined with, cut by user into buckets on disk, so that one bucket is in memory at a time.

What is found for the requests of a bucket is a file of its own; ``Found`` puts them together in the order of the requests.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import record_batch
from sidrec_torchrec.data.events import Events
from sidrec_torchrec.data.features import Features
from sidrec_torchrec.data.histories import Histories, coded_events, event_schema
from sidrec_torchrec.data.ids import id_type
from sidrec_torchrec.data.items import ItemRows, Items
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.requests import AskedBatch, GivenRequests, Known, RequestBatch
from sidrec_torchrec.data.scatter import write_by_user
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.files import atomic_path

_PER_BUCKET = 1 << 22  # events, or requests: about 200 MB in memory
_PER_SHARE = 1 << 21
_BUCKETS = 8  # at least, so that several processes can work on them
_BATCH = 1 << 14
ROW = "row"


@dataclass(frozen=True)
class RequestBuckets:
    """Requests and events cut by user. Made by ``RequestBuckets.of``; can be pickled, for processes that read its folder.

    Args:
        folder: of the buckets.
        count: how many there are.
        log: the events.
        items: the item file.
        policy: what to do about events that cannot be read as they are.
        features: of events and requests.
        requests: None where the log's own last events are asked about.
    """

    folder: Path
    count: int
    log: Events
    items: Items
    policy: EventPolicy
    features: Features
    requests: GivenRequests | None

    @staticmethod
    def of(
        folder: Path,
        log: Events,
        items: Items,
        policy: EventPolicy,
        features: Features,
        requests: GivenRequests | None,
    ) -> "RequestBuckets":
        """So many buckets that each fits into memory, unless a user has millions of events."""
        most = max(log.num_events, 0 if requests is None else requests.num_requests)
        count = max(_BUCKETS, -(-most // _PER_BUCKET))
        return RequestBuckets(folder, count, log, items, policy, features, requests)

    def cut(self, engine: Engine) -> None:
        """Writes the buckets, if they are not there.

        Raises:
            DataError: on bad events or requests; names file, column and row.
        """
        if self.folder.exists():
            return
        with atomic_path(self.folder) as folder:
            folder.mkdir()
            cut = _Cut(self, folder)
            for _ in engine.map(cut, [(of, share) for of in self._shares for share in range(self._shares[of])]):
                pass

    def histories(self, bucket: int) -> Histories:
        """Those of the users of a bucket."""
        batches = self._read("events", bucket)
        count, num_features = sum(map(len, batches)), len(self.features.of_log)
        return Histories.of(batches, count, num_features, self.policy, self.log.table)

    def asked(self, bucket: int) -> "BucketRequests":
        """The requests of the users of a bucket."""
        table = pa.Table.from_batches(self._read("requests", bucket), self.schema_of("requests"))
        if self.requests is None:
            raise ValueError("there are no requests but the log's own events")
        return BucketRequests(table.combine_chunks(), self.requests)

    @cached_property
    def rows(self) -> ItemRows:
        """Of the item file."""
        return ItemRows(self.items)

    @cached_property
    def _shares(self) -> dict[str, int]:
        """Pieces of the events, and of the requests."""
        tables = {"events": self.log.table} | ({} if self.requests is None else {"requests": self.requests.table})
        return {of: max(1, min(table.num_rows // _PER_SHARE, table.num_row_groups)) for of, table in tables.items()}

    def schema_of(self, kind: str) -> pa.Schema:
        """Of a bucket's events, or requests, whose columns are a user's id, row, row of the item file, time, and features."""
        if self.requests is None or kind == "events":
            return event_schema(self.log.user_id_type, len(self.features.of_log))
        user_ids = id_type(self.requests.table.type_of("user_id"))
        columns = [("user_id", user_ids), (ROW, pa.int64()), ("item", pa.int32()), ("timestamp", pa.int64())]
        return pa.schema([*columns, *((f"feature_{f}", pa.int16()) for f in range(len(self.features.event)))])

    def file(self, kind: str, bucket: int, share: int) -> Path:
        """What a share of the events, or the requests, has for a bucket."""
        return self.folder / f"{kind}-{bucket}-{share}.arrow"

    def _read(self, kind: str, bucket: int) -> list[pa.RecordBatch]:
        batches = []
        for share in range(self._shares[kind]):
            with pa.memory_map(str(self.file(kind, bucket, share))) as source:
                reader = pa.ipc.open_file(source)
                batches += [reader.get_batch(number) for number in range(reader.num_record_batches)]
        return batches


@dataclass(frozen=True)
class _Cut:
    """Cuts a share of the events, or of the requests, into files under ``folder``."""

    buckets: RequestBuckets
    folder: Path

    def __call__(self, piece: tuple[str, int]) -> None:
        kind, share = piece
        own = self.buckets
        schema, shares = own.schema_of(kind), own._shares[kind]
        with ExitStack() as stack:
            files = [self.folder / own.file(kind, bucket, share).name for bucket in range(own.count)]
            writers = [stack.enter_context(pa.ipc.new_file(str(file), schema)) for file in files]
            if kind == "events":
                batches = coded_events(own.log, own.rows, own.policy, own.features, (share, shares))
            else:
                batches = self._coded_requests(schema, (share, shares))
            for batch in batches:
                write_by_user(writers, batch)

    def _coded_requests(self, schema: pa.Schema, share: tuple[int, int]) -> Iterator[pa.RecordBatch]:
        own = self.buckets
        if own.requests is None:
            return
        for first_row, asked in own.requests.asked(own.rows, own.features, share):
            row_R = np.arange(first_row, first_row + len(asked.user_ids))
            columns = [asked.user_ids, row_R, asked.items, asked.timestamps]
            columns += [*np.ascontiguousarray(asked.features.T)]
            yield record_batch(columns, schema)


@dataclass(frozen=True)
class BucketRequests:
    """Requests of a bucket, in the order of their rows. Made by ``RequestBuckets.asked``.

    Args:
        table: see ``RequestBuckets.schema_of``.
        requests: all of them.
    """

    table: pa.Table
    requests: GivenRequests

    @property
    def schema(self) -> pa.Schema:
        """The row alone."""
        return pa.schema([(ROW, pa.int64())])

    @property
    def num_requests(self) -> int:
        return len(self.table)

    def batches(self, known: Known) -> Iterator[RequestBatch]:
        """See ``Requests``."""
        for batch in self.table.to_batches(_BATCH):
            user_ids, rows, items, timestamps, *features = batch.columns
            codes = [column.to_numpy() for column in features]
            asked = AskedBatch(
                columns=pa.RecordBatch.from_arrays([rows], schema=self.schema),
                user_ids=user_ids,
                items=items.to_numpy(),
                timestamps=timestamps.to_numpy(),
                features=np.stack(codes, axis=1) if codes else np.zeros((len(batch), 0), np.int16),
                where=self.requests.table.at("user_id", rows[0].as_py()),
            )
            yield asked.joined(known)
