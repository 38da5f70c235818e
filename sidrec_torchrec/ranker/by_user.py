"""Predictions of any number of requests from a log of any length: one bucket of users at a time, on any number of processes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.request_buckets import ROW, RequestBuckets
from sidrec_torchrec.data.requests import EVENT_ROW, GivenRequests, NewestEvents, Requests
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, remove
from sidrec_torchrec.ranker.predictor import Predictor, Scored
from sidrec_torchrec.training.progress import Stage

_WITHOUT_HISTORY = "sidrec.without_history"  # no name that a column of requests would have
_BATCH = 1 << 14


def score_by_user(
    predictor: Predictor,
    requests: GivenRequests | None,
    newest: int,
    scratch: Path,
    engine: Engine,
    progress: Stage,
) -> "Scores":
    """Cuts requests and events by user, and scores each bucket; what is in ``scratch`` already is not done again.

    Args:
        predictor: that scores; its events need not be read.
        requests: to score; None for the last events of each user,
        newest: so many.
        scratch: folder for buckets and scores.
        engine: that works on them.
        progress: moves on with each bucket, of ``Scores.count``.

    Raises:
        DataError: on bad events or requests; names file, column and row.
    """
    own = predictor.trained.trained_on.prepared
    buckets = RequestBuckets.of(scratch / "buckets", predictor.log, predictor.items, own.policy, own.features, requests)
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        buckets.cut(engine)
        work = ScoreBucket(predictor, buckets, scratch, newest)
        todo = [bucket for bucket in range(buckets.count) if not work.file(bucket).exists()]
        progress.advance(buckets.count - len(todo))
        for _ in engine.map(work, todo, on_gpus=True):
            progress.advance()
    except DataError:  # of other data nothing will be of use
        remove(scratch)
        raise
    return Scores(work)


@dataclass(frozen=True)
class ScoreBucket:
    """Scores the requests of a bucket of users, and writes what it finds.

    Args:
        predictor: that scores.
        buckets: the requests, and the events.
        folder: where to.
        newest: how many last events of each user are asked about, if there are no other requests.
    """

    predictor: Predictor
    buckets: RequestBuckets
    folder: Path
    newest: int

    def __call__(self, bucket: int) -> None:
        predictor = self.predictor
        known = predictor.joining(self.buckets.histories(bucket))
        requests: Requests
        if self.buckets.requests is None:
            requests = NewestEvents(predictor.items, known.histories, self.newest)
        else:
            requests = self.buckets.asked(bucket)
        with atomic_path(self.file(bucket)) as file, pa.ipc.new_file(str(file), self.schema) as writer:
            for scored in predictor.score(requests, known):
                columns = [*scored.columns.columns, pa.array(scored.is_without_history)]
                columns += [pa.array(column) for column in np.ascontiguousarray(scored.probability_RK.T)]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))

    @property
    def columns(self) -> pa.Schema:
        """What tells the requests: the columns of the last events, or the rows of those that were given."""
        if self.buckets.requests is not None:
            return pa.schema([(ROW, pa.int64())])
        return self.predictor.newest_schema

    @property
    def schema(self) -> pa.Schema:
        """Of what is written."""
        found = [(_WITHOUT_HISTORY, pa.bool_()), *((name, pa.float32()) for name in self.predictor.names)]
        return pa.schema([*self.columns, *map(pa.field, *zip(*found, strict=True))])

    def file(self, bucket: int) -> Path:
        """What it writes."""
        return self.folder / f"scores-{bucket}.arrow"


class Scores:
    """What was found of all buckets, in the order of the requests.

    Args:
        work: that wrote it.
    """

    def __init__(self, work: ScoreBucket) -> None:
        self._requests, self._columns, self._names = work.buckets.requests, work.columns, list(work.predictor.names)
        self._tables = []
        for bucket in range(work.buckets.count):
            with pa.memory_map(str(work.file(bucket))) as source:
                self._tables.append(pa.ipc.open_file(source).read_all())
        key = EVENT_ROW if self._requests is None else ROW
        self._rows = [table.column(key).to_numpy() for table in self._tables]

    def batches(self, first: int = 0) -> Iterator[Scored]:
        """As ``Predictor.score`` gives them.

        Args:
            first: batches to leave out.
        """
        for number, (begin, end, columns) in enumerate(self._places()):
            if number >= first:
                yield self._scored(begin, end, columns)

    def _places(self) -> Iterator[tuple[int, int, pa.RecordBatch | None]]:
        """From which row to which a batch is; and its columns, where they are not those of the scores."""
        if self._requests is not None:
            for first_row, columns in self._requests.columns():
                yield first_row, first_row + len(columns), columns
            return
        rows = np.sort(np.concatenate(self._rows))
        starts = [*rows[::_BATCH].tolist(), int(rows[-1]) + 1 if len(rows) else 0]
        for begin, end in pairwise(starts):
            yield begin, end, None

    def _scored(self, begin: int, end: int, columns: pa.RecordBatch | None) -> Scored:
        places = [np.searchsorted(row_R, (begin, end)).tolist() for row_R in self._rows]
        table = pa.concat_tables([t.slice(a, b - a) for t, (a, b) in zip(self._tables, places, strict=True)])
        rows = np.concatenate([row_R[a:b] for row_R, (a, b) in zip(self._rows, places, strict=True)])
        table = table.take(pa.array(np.argsort(rows)))
        (own,) = table.select(self._columns.names).combine_chunks().to_batches()
        probabilities = [table.column(name).to_numpy() for name in self._names]
        return Scored(
            own if columns is None else columns,
            table.column(_WITHOUT_HISTORY).to_numpy(),
            np.stack(probabilities, axis=1),
        )
