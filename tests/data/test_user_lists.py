"""Features of users that are lists: their codes in sequences, in batches and of requests, against a plain definition."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidrec_torchrec.data.batches import Collator
from sidrec_torchrec.data.drift import drift, stability_index
from sidrec_torchrec.data.events import open_events, open_users, users_of
from sidrec_torchrec.data.features import Feature
from sidrec_torchrec.data.format import DataFolder, DataSchema, open_items, validate
from sidrec_torchrec.data.histories import Histories, UserCodes
from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.parquet import ArrowTable
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.propose import propose
from sidrec_torchrec.data.requests import GivenRequests, Known, NewestEvents
from sidrec_torchrec.data.seen_by import check_alike, seen_by
from sidrec_torchrec.data.user_lists import Lists
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.part_files import part_path
from tests.data.test_features import CONFIG, NoFeatures
from tests.data.test_format import fixed
from tests.data.test_prepare import rows_of, write_corpus

SCHEMA = DataSchema(user_columns=("kind", "genres", "rooms"))
NUM_USERS = 28  # that have a row
KINDS = [
    pa.list_(pa.string()),
    pa.large_list(pa.large_string()),
    pa.list_view(pa.string()),
    pa.list_(pa.dictionary(pa.int8(), pa.string())),
]


def add_lists(folder, **columns) -> dict[int, tuple[list, list]]:
    """A corpus whose users have lists, some of them null, empty or with a value twice; by user what they are."""
    write_corpus(folder)
    users = pq.read_table(folder / "users.parquet")
    rng = np.random.default_rng(5)
    genres = [
        None,
        [],
        *(rng.choice(["folk", "jazz", "pop"], rng.integers(1, 5)).tolist() for _ in range(2, len(users))),
    ]
    rooms = [rng.integers(0, 4, 2).tolist() if rng.random() < 0.8 else None for _ in range(len(users))]
    made = {"genres": pa.array(genres), "rooms": pa.array(rooms, fixed(pa.int16(), 2))} | columns
    for name, column in made.items():
        users = users.append_column(name, column)
    pq.write_table(users, folder / "users.parquet")
    return dict(zip(users["user_id"].to_pylist(), zip(genres, rooms, strict=True), strict=True))


def codes_of(values: tuple, column: list | None) -> list[int]:
    """The definition: places, from 1, of the known values of a list, each once."""
    return sorted({1 + values.index(value) for value in column or [] if value in values})


@given(
    rows=st.lists(st.none() | st.lists(st.none() | st.sampled_from(["a", "b", "c", "new"]), max_size=6), max_size=12),
    kind=st.sampled_from(KINDS),
    first=st.integers(0, 3),
)
def test_codes_are_those_of_the_definition(rows, kind, first):
    feature = Feature("x", ("a", "b", "c"), is_list=True)
    column = pa.array(rows, kind)[first:]
    lists = Lists.encode(feature, column)
    expected = [codes_of(feature.values, row) for row in rows[first:]]
    assert [lists[row].tolist() for row in range(len(lists))] == expected
    again = Lists.of_arrow(pa.chunked_array([lists.to_arrow()[:2], lists.to_arrow()[2:]]))
    assert [again[row].tolist() for row in range(len(again))] == expected
    if expected:
        places = np.array([len(expected) - 1, 0, -1])
        taken = lists.take(places)
        assert [taken[row].tolist() for row in range(3)] == [expected[place] for place in places]


def test_what_is_beneath_a_null_is_not_read():
    column = pa.ListArray.from_arrays(
        pa.array([0, 2, 3], pa.int32()), pa.array(["a", "b", "b"]), mask=pa.array([True, False])
    )
    lists = Lists.encode(Feature("x", ("a", "b"), is_list=True), column)
    assert [lists[0].tolist(), lists[1].tolist()] == [[], [2]]


def test_sequences_batches_and_requests_have_the_codes_of_their_users(tmp_path):
    own = add_lists(tmp_path)
    folder = DataFolder.of(tmp_path, DataSchema(user_columns=("genres", "kind", "rooms")))
    prepared = prepare(folder, tmp_path / "out", CONFIG)
    assert prepared.user_features == {"kind": 3, "genres": 4, "rooms": 5} and prepared.user_lists == ("genres", "rooms")
    values = prepared.vocabularies
    assert values == {
        "kind": ["a", "b"],
        "genres": {"lists_of": ["folk", "jazz", "pop"]},
        "rooms": {"lists_of": [0, 1, 2, 3]},
    }

    def expected(user_id) -> list[list[int]]:
        genres, rooms = own.get(user_id, (None, None))
        return [codes_of(("folk", "jazz", "pop"), genres), codes_of((0, 1, 2, 3), rooms)]

    rows = [row for split in ("train", "validation", "test") for row in rows_of(prepared, split)]
    assert {row.user_id for row in rows} - own.keys()  # a user without a row, too
    for row in rows:
        assert [codes.tolist() for codes in row.user_lists] == expected(row.user_id) and len(row.user_codes) == 1
    users = Collator(prepared, NoFeatures())(rows).users
    assert users.keys() == ["kind", "genres", "rooms"]
    for f, name in enumerate(("genres", "rooms")):
        assert [codes.tolist() for codes in users[name].to_dense()] == [expected(row.user_id)[f] for row in rows]

    log, items = open_events(folder), open_items(folder)
    item_rows = ItemRows(items)
    known = Known(item_rows, Histories.read(log, item_rows), UserCodes.read(open_users(folder), values))
    events = pq.read_table(tmp_path / "events.parquet")
    given = GivenRequests(ArrowTable.of(events.take([3, len(events) - 1]), "requests"))
    for requests in (given, NewestEvents(items, known.histories, 2)):
        for batch in requests.batches(known):
            for places in batch.rows(4):
                row = batch.sequence(places, known.histories, 6)
                assert [codes.tolist() for codes in row.user_lists] == expected(row.user_id)
    nobody = UserCodes.read(None, values).of(pa.array([1, 2]))
    assert nobody[0].shape == (2, 1) and [len(own) for own in nobody[1]] == [2, 2] and not len(nobody[1][0].code_V)


def test_lists_that_nobody_names_are_not_read(tmp_path):
    add_lists(tmp_path)
    prepared = prepare(tmp_path, tmp_path / "out", CONFIG)
    assert list(prepared.user_features) == ["kind"] and prepared.user_lists == ()
    assert not any(name.startswith("user.") for name in pq.read_schema(part_path(prepared.path("train"), 0)).names)
    unread = validate(tmp_path)["unread"]["users"]
    assert unread.keys() == {"genres", "rooms"} and "read if it is among --user-columns" in unread["genres"]
    assert validate(DataFolder.of(tmp_path, SCHEMA))["unread"]["users"] == {}


def test_a_schema_is_proposed_with_lists_of_few_values(tmp_path):
    add_lists(tmp_path, tokens=pa.array([[f"t{i}", f"s{i}"] for i in range(NUM_USERS)]))
    assert set(propose(DataFolder.of(tmp_path)).user_columns) == {"kind", "genres", "rooms"}


def test_data_prepared_like_others_leave_new_values_out_and_what_has_moved_is_said(tmp_path):
    add_lists(tmp_path)
    own = prepare(DataFolder.of(tmp_path, SCHEMA), tmp_path / "own", CONFIG)
    users = pq.read_table(tmp_path / "users.parquet")
    place = users.schema.get_field_index("genres")
    genres = [None, *([["jazz", "ska", "ska", None]] * (len(users) - 1))]
    pq.write_table(users.set_column(place, "genres", pa.array(genres)), tmp_path / "users.parquet")
    like = prepare(tmp_path, tmp_path / "like", CONFIG, own)
    assert like.vocabularies == own.vocabularies
    assert {tuple(row.user_lists[0]) for row in rows_of(like, "test")} == {(), (2,)}
    check_alike(own, like, "R")
    found = drift(own, seen_by(own, like))
    had = own.profile["features"]["genres"]
    assert had["unknown"] == 0 and had["missing"] == 2
    moved, others = found["features"]["genres"], len(users) - 1
    assert moved["unknown"] == [0, others / (2 * others + 1)]
    assert moved["psi"] == pytest.approx(stability_index([*had["counts"], 0, 2], [0, others, 0, others, 1]))
    assert any("'genres'" in line and "not know" in line for line in found["warnings"])
    anew = prepare(DataFolder.of(tmp_path, SCHEMA), tmp_path / "anew", CONFIG)
    with pytest.raises(SidrecError, match="user feature 'genres', code 1, is 'jazz' there and 'folk' to the ranker"):
        check_alike(own, anew, "R")
    single = users.set_column(place, "genres", pa.array(["jazz"] * len(users)))
    pq.write_table(single, tmp_path / "users.parquet")
    with pytest.raises(DataError, match="'genres' is string; its vocabulary was made from lists of strings"):
        prepare(tmp_path, tmp_path / "bad", CONFIG, own)
    other = prepare(DataFolder.of(tmp_path, SCHEMA), tmp_path / "single", CONFIG)
    with pytest.raises(SidrecError, match="user feature 'genres' holds one value a row there and lists to the ranker"):
        check_alike(own, other, "R")


BAD = {
    "column 'scores' is list<.*double>; a list feature holds lists of strings, integers": ("scores", [[0.5]]),
    "column 'genres' is list<.*string>; a dense feature holds numbers": ("genres:dense", None),
    "column 'nothing' .*no value in any row": ("nothing", [[]]),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_lists_are_refused(message, tmp_path):
    name, row = BAD[message]
    kind = pa.list_(pa.float64() if name == "scores" else pa.string())
    more = {} if row is None else {name: pa.array(row * NUM_USERS, kind)}
    add_lists(tmp_path, **more)
    folder = DataFolder.of(tmp_path, DataSchema(user_columns=(name,)))
    for job in (lambda: prepare(folder, tmp_path / "out", PrepareConfig()), lambda: validate(folder)):
        with pytest.raises(DataError, match=message):
            job()
    assert not (tmp_path / "out").exists()


def test_lists_that_are_all_empty_have_no_type_of_their_own():
    table = pa.Table.from_pylist([{"user_id": 1, "genres": []}, {"user_id": 2, "genres": None}])
    assert pa.types.is_null(table.schema.field("genres").type.value_type)
    users = users_of(ArrowTable.of(table, "users"), DataSchema(user_columns=("genres",)))
    codes = UserCodes.read(users, {"genres": {"lists_of": ["jazz"]}})
    assert codes.of(pa.array([1, 2, 3]))[1][0].offset_R1.tolist() == [0, 0, 0, 0]
