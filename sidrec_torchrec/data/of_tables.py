"""The functions that make sequences, for engines that move tables themselves, as Spark does, and write no buckets."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.buckets import EventBuckets
from sidrec_torchrec.data.census import Census
from sidrec_torchrec.data.events import events_of, open_events
from sidrec_torchrec.data.features import Coder
from sidrec_torchrec.data.folder import DataFolder, DataSchema
from sidrec_torchrec.data.items import open_items
from sidrec_torchrec.data.parquet import ArrowTable
from sidrec_torchrec.data.protocol import PrepareConfig, Splitter
from sidrec_torchrec.data.scatter import EventCoder
from sidrec_torchrec.data.splits import BucketSequences
from sidrec_torchrec.errors import DataError


@dataclass(frozen=True)
class TableCoder:
    """Makes of a table of events what ``BucketSequences`` takes. Made by ``of_tables``; can be pickled.

    Args:
        coder: that makes it.
        tasks: as ``--tasks`` names them.
        schema: what the events' columns are called.
    """

    coder: EventCoder
    tasks: tuple[str, ...]
    schema: DataSchema

    def __call__(self, events: pa.Table) -> pa.Table:
        """Columns of ``EventBuckets.event_schema``, a row for each event, in their order.

        Args:
            events: some events, in any order, with the columns of the log.

        Raises:
            DataError: on bad events; names column and row of the table.
        """
        log = events_of(ArrowTable.of(events, "events", self.schema.names), self.tasks, self.schema)
        return pa.Table.from_batches(self.coder(log), self.coder.buckets.event_schema)


def of_tables(data: str | Path | DataFolder, config: PrepareConfig) -> tuple[TableCoder, BucketSequences]:
    """What makes of events what sequences are made of, and what makes sequences of all events of some users.

    Both can be pickled. Features of users and events are left out.

    Args:
        data: the data folder; of its events only the columns are looked at.
        config: the protocol.

    Raises:
        ValueError: if events on unknown items are to be dropped: a row of the table is then no row of the result.
        DataError: if the log has no labels: negatives are drawn from all of it, by ``prepare``.
    """
    if config.policy.unknown_items == "drop":
        raise ValueError("unknown_items is 'drop': leave such events out of the table, or keep them")
    data = DataFolder.of(data)
    schema = replace(data.schema, event_features=(), history_features=())
    items, log = open_items(data, sources=(), targets=()), open_events(data, config.tasks)
    if not (log.tasks or log.regressions):
        raise DataError(
            f"{log.path}: has no labels, and its negatives are drawn from the whole log: prepare it with `sidrec prepare`"
        )
    buckets = EventBuckets(
        path=log.path,
        folder=Path(),
        count=1,
        shares=1,
        tasks=log.tasks,
        regressions=log.regressions,
        id_type=log.user_id_type,
        num_features=0,
        num_lists=0,
        num_raw=0,
        is_weighted=bool(log.weight),
        policy=config.policy,
    )
    none_I = np.zeros(items.num_items, np.int64)  # a census is what negatives are drawn by
    census = Census(training_I=none_I, test_I=none_I, seen_I=none_I > 0, first_event_I=none_I, last_training_event=None)
    sequences = BucketSequences(buckets, Splitter(config, items.num_items), census, Coder([], ()))
    return TableCoder(EventCoder(buckets, items), config.tasks, schema), sequences
