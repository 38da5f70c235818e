"""What requests are joined with: a user's events before a time, in the order of the file; ties; each user's newest."""

import numpy as np
import pyarrow as pa
import pytest

from sidrec_torchrec.data.events import events_of
from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.data.histories import Histories, UserCodes
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.parquet import ArrowTable
from sidrec_torchrec.data.requests import GivenRequests, Known, NewestEvents
from sidrec_torchrec.errors import DataError
from tests.data.test_prepare import write_corpus

TASKS = ("label",)


def table(user, item, time, label=None) -> pa.Table:
    columns = {"user_id": user, "item_id": item, "timestamp": time}
    columns = {name: pa.array(values, pa.int64()) for name, values in columns.items()}
    return pa.table(columns | {"label": pa.array([0] * len(user) if label is None else label, pa.int8())})


EVENTS = table(  # users 5 and -2 in turns; 5 has a tie at 20 and one at 30
    [5, -2, 5, 5, -2, 5, 5, 5], [100, 110, 120, 130, 140, 150, 160, 170], [10, 10, 20, 20, 25, 30, 30, 40], [1, 0] * 4
)


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder)
    return open_items(folder, sources=(), targets=())


def known_of(items, events: pa.Table) -> Known:
    rows = ItemRows(items)
    log = events_of(ArrowTable.of(events, "events"), TASKS)
    return Known(rows, Histories.read(log, rows), UserCodes.read(None, {}))


def histories(items, events: pa.Table, requests: pa.Table) -> list[list[int]]:
    """Rows of the events that each request reads."""
    known = known_of(items, events)
    (batch,) = GivenRequests(ArrowTable.of(requests, "requests")).batches(known)
    return [known.histories.row_N[b:e].tolist() for b, e in zip(batch.begins, batch.ends, strict=True)]


def test_a_request_reads_what_came_strictly_before(items):
    time = [10, 11, 20, 21, 30, 40, 41, 25, 26, 99, 0]
    requests = table([5] * 7 + [-2] * 2 + [7, 5], [100] * 11, time)
    expected = [[], [0], [0], [0, 2, 3], [0, 2, 3], [0, 2, 3, 5, 6], [0, 2, 3, 5, 6, 7], [1], [1, 4], [], []]
    assert histories(items, EVENTS, requests) == expected
    assert histories(items, EVENTS[:0], requests) == [[]] * 11
    known = known_of(items, EVENTS)
    assert known.histories.action_N[np.argsort(known.histories.row_N)].tolist() == [1, 0] * 4


def test_random_logs_against_a_plain_search(items):
    rng = np.random.default_rng(0)
    time_N = np.sort(rng.integers(0, 60, 300))
    events = table(rng.integers(0, 9, 300), [100] * 300, time_N)
    requests = table(rng.integers(-1, 10, 200), [110] * 200, rng.integers(0, 62, 200))
    user_N = events["user_id"].to_numpy()
    expected = [
        np.flatnonzero((user_N == user) & (time_N < time)).tolist()
        for user, time in zip(requests["user_id"].to_pylist(), requests["timestamp"].to_pylist(), strict=True)
    ]
    assert histories(items, events, requests) == expected


@pytest.mark.parametrize(("count", "rows"), [(1, [4, 7]), (3, [1, 4, 5, 6, 7]), (100, list(range(8)))])
def test_the_newest_events_read_those_before_them_in_the_file(items, count, rows):
    known = known_of(items, EVENTS)
    newest = NewestEvents(items, known.histories, count)
    (batch,) = newest.batches(known)
    assert newest.num_requests == len(batch) == len(rows)
    assert batch.columns.to_pydict() == EVENTS.take(rows).drop_columns("label").to_pydict() | {"event_row": rows}
    own = {5: [0, 2, 3, 5, 6, 7], -2: [1, 4]}
    for place, row in enumerate(rows):
        read = known.histories.row_N[batch.begins[place] : batch.ends[place]].tolist()
        assert read == [other for other in own[batch.user_ids[place].as_py()] if other < row]


def test_requests_of_one_history_share_a_row(items):
    known = known_of(items, EVENTS)
    requests = table([5, 7, 5, 8, 5, 5], [100, 110, 120, 130, 140, 150], [41, 41, 50, 41, 25, 41])
    (batch,) = GivenRequests(ArrowTable.of(requests, "requests")).batches(known)
    rows = batch.rows(most=2)
    assert sorted(sorted(row.tolist()) for row in rows) == [[0, 5], [1], [2], [3], [4]]
    (two,) = [row for row in rows if len(row) == 2]
    sequence = batch.sequence(two, known.histories, max_history=4)
    assert sequence.order.tolist() == [2, 3, 4, 5, 6, 6]  # places among all the user's events, those left out too
    assert sequence.visible.tolist() == [True] * 4 + [False] * 2
    assert sequence.timestamp.tolist() == [20, 30, 30, 40, 41, 41]
    assert sequence.num_targets == 2
    assert sequence.action.tolist() == [*EVENTS["label"].take([3, 5, 6, 7]).to_pylist(), 0, 0]


def test_bad_events_are_refused_in_words(items):
    backwards = EVENTS.take([0, 3, 2, 7, 1, 6])
    with pytest.raises(
        DataError, match="events: column 'timestamp', row 5: goes backwards for user_id 5, 30 after 40; sort"
    ):
        known_of(items, backwards)
    with pytest.raises(
        DataError, match="events: column 'item_id', row 1: item_id 7 is not in .*items.parquet; add the item"
    ):
        known_of(items, table([1, 1], [100, 7], [1, 2]))
    with pytest.raises(DataError, match="events: column 'label', row 1: 3; a label is 0 or 1"):
        known_of(items, table([1, 1], [100, 100], [1, 2], [0, 3]))
