"""Data sets as others write them: parts, partitions, globs, other names, types and units."""

import datetime as dt
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.columns import seconds
from sidrec_torchrec.data.folder import DataFolder, DataSchema, open_table
from sidrec_torchrec.data.format import open_events, open_items, open_users, validate
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.errors import DataError

DAY = 86_400
T0 = 1_700_000_000


def events_table(rows: int = 12) -> pa.Table:
    row = np.arange(rows)
    columns = {"user_id": row // 4, "item_id": row % 5, "timestamp": T0 + row * DAY, "label": (row % 2).astype(np.int8)}
    return pa.table(columns)


def items_table() -> pa.Table:
    x_ND = np.arange(1, 11, dtype=np.float32)
    return pa.table({"item_id": np.arange(5), "emb": pa.FixedSizeListArray.from_arrays(pa.array(x_ND), 2)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pq.write_table(items_table(), tmp_path / "items.parquet")
    return tmp_path


def read(data: Path | DataFolder) -> dict[str, list]:
    batches = list(open_events(data).batches(5))
    columns = {
        "user": [b.user_ids.to_pylist() for b in batches],
        "item": [b.item_ids.to_pylist() for b in batches],
        "time": [b.timestamps.tolist() for b in batches],
        "label": [b.labels[:, 0].tolist() for b in batches],
    }
    return {name: list(chain.from_iterable(parts)) for name, parts in columns.items()}


EXPECTED = {
    "user": [i // 4 for i in range(12)],
    "item": [i % 5 for i in range(12)],
    "time": [T0 + i * DAY for i in range(12)],
    "label": [i % 2 for i in range(12)],
}


def test_one_file_parts_partitions_and_globs_are_one_log(folder):
    table = events_table()
    pq.write_table(table, folder / "events.parquet")
    assert read(folder) == EXPECTED
    (folder / "events.parquet").unlink()
    parts = folder / "events.parquet"
    parts.mkdir()
    for number in range(3):
        pq.write_table(table.slice(number * 4, 4), parts / f"part-{number:05d}.snappy.parquet")
    (parts / "_SUCCESS").touch()
    (parts / ".part-00000.crc").touch()
    assert read(folder) == EXPECTED
    assert validate(folder)["events"] == 12
    parts.rename(folder / "events")
    assert read(folder) == EXPECTED
    for number, part in enumerate(sorted((folder / "events").glob("*.parquet"))):
        day = folder / "logs" / f"day=2026-10-0{number + 1}"
        day.mkdir(parents=True)
        part.rename(day / "0.parquet")
    assert read(DataFolder.of(folder, DataSchema(events="logs"))) == EXPECTED
    assert read(DataFolder.of(folder, DataSchema(events="logs/day=*/*.parquet"))) == EXPECTED
    two = read(DataFolder.of(folder, DataSchema(events=str(folder / "logs" / "day=2026-10-0[12]" / "*.parquet"))))
    assert two["time"] == EXPECTED["time"][:8]


def test_partitions_are_columns(folder):
    """Integers stay integers, Hive's default is null, and a file's folders above the data set are none of it."""
    for user, label in ((3, 1), (4, 0)):
        part = folder / "env=prod" / "events.parquet" / f"user_id={user}" / f"label={label}"
        part.mkdir(parents=True)
        pq.write_table(events_table(3).select(["item_id", "timestamp"]), part / "a.parquet")
    table = ParquetTable.open(folder / "env=prod" / "events.parquet")
    assert set(table.schema.names) == {"user_id", "label", "item_id", "timestamp"}
    assert read(folder / "env=prod" / "events.parquet") == {
        "user": [3] * 3 + [4] * 3,
        "item": [0, 1, 2] * 2,
        "time": EXPECTED["time"][:3] * 2,
        "label": [1] * 3 + [0] * 3,
    }
    null = folder / "env=prod" / "events.parquet" / "user_id=__HIVE_DEFAULT_PARTITION__" / "label=1"
    null.mkdir(parents=True)
    pq.write_table(events_table(3).select(["item_id", "timestamp"]), null / "a.parquet")
    with pytest.raises(
        DataError, match=r"user_id=__HIVE_DEFAULT_PARTITION__/label=1/a.parquet: column 'user_id', row 0: null"
    ):
        read(folder / "env=prod" / "events.parquet")


def test_rows_are_named_by_their_part(folder):
    parts = folder / "events.parquet"
    parts.mkdir()
    pq.write_table(events_table(), parts / "a.parquet")
    bad = events_table().set_column(1, "item_id", pa.array([0] * 7 + [None] + [0] * 4, pa.int64()))
    pq.write_table(bad, parts / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: column 'item_id', row 7: null"):
        read(folder)
    (parts / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"b.parquet: not a Parquet file"):
        read(folder)
    pq.write_table(events_table().set_column(1, "item_id", pa.array(["a"] * 12)), parts / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: column 'item_id' is string, in .*a.parquet it is int64"):
        read(folder)
    pq.write_table(events_table().drop_columns("label"), parts / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: no column 'label', which .*a.parquet has"):
        read(folder)


def test_parts_may_differ_in_how_arrow_keeps_a_type(folder):
    parts = folder / "events.parquet"
    parts.mkdir()
    table = events_table()
    pq.write_table(table, parts / "a.parquet")
    small = pa.table(
        {
            "timestamp": table["timestamp"],
            "label": table["label"].cast(pa.bool_()),
            "item_id": table["item_id"].cast(pa.int32()),
            "user_id": table["user_id"].cast(pa.uint8()),
        }
    )
    pq.write_table(small.set_column(1, "label", table["label"].cast(pa.int64())), parts / "b.parquet")
    assert read(folder) == {name: values * 2 for name, values in EXPECTED.items()}


def test_stretches_of_parts_for_several_processes(tmp_path):
    """Every row once, in order, for any world size; row groups are numbered over all parts."""
    for number in range(3):
        pq.write_table(pa.table({"a": np.arange(10) + 10 * number}), tmp_path / f"{number}.parquet", row_group_size=4)
    table = ParquetTable.open(tmp_path)
    assert (table.num_rows, table.num_row_groups) == (30, 9)
    for world_size in (1, 2, 3, 5, 20):
        read = [
            (first, batch.column("a").to_pylist())
            for rank in range(world_size)
            for first, batch in table.batches(["a"], 3, share=(rank, world_size))
        ]
        assert list(chain.from_iterable(values for _, values in read)) == list(range(30))
        assert all(values[0] == first for first, values in read)
    chosen = list(table.batches(["a"], 99, row_groups=[8, 3]))
    assert [(first, batch.column("a").to_pylist()) for first, batch in chosen] == [
        (28, [28, 29]),
        (10, [10, 11, 12, 13]),
    ]


def test_columns_of_other_names(folder):
    table = events_table().rename_columns(["uid", "sku", "ts", "label"]).append_column("user_id", pa.array([9] * 12))
    pq.write_table(table, folder / "events.parquet")
    pq.write_table(items_table().rename_columns(["sku", "emb"]), folder / "items.parquet")
    with pytest.raises(
        DataError, match=r"no required column 'item_id'; the file has 'sku' \(int64\).*--columns item_id=ITS_NAME"
    ):
        open_items(folder)
    data = DataFolder.of(folder, DataSchema(columns=("user_id=uid", "item_id=sku", "timestamp=ts")))
    assert read(data) == EXPECTED
    assert open_items(data).ids().to_pylist() == [0, 1, 2, 3, 4]
    wrong = DataFolder.of(folder, DataSchema(columns=("user_id=uid", "item_id=sku", "timestamp=ts", "label=lable")))
    with pytest.raises(DataError, match="no file has a column 'lable', which --columns label=lable names"):
        read(wrong)
    data.write_schema()
    assert read(folder) == EXPECTED  # every job finds it there
    bad = table.set_column(1, "sku", pa.array([0] * 11 + [None], pa.int64()))
    pq.write_table(bad, folder / "events.parquet")
    with pytest.raises(DataError, match="column 'sku', row 11: null"):
        read(folder)


@pytest.mark.parametrize(
    "columns", [("item_id",), ("=sku",), ("item_id=",), ("item_id=a", "item_id=b"), ("a=c", "b=c")]
)
def test_maps_that_are_none(columns):
    with pytest.raises(ValueError, match="columns: "):
        DataSchema(columns=columns)


def test_a_broken_schema_is_named(folder):
    (folder / "schema.json").write_text('{"colums": []}')
    with pytest.raises(DataError, match=r"schema.json: no schema: .*colums"):
        DataFolder.of(folder)
    (folder / "schema.json").write_text("[1]")
    with pytest.raises(DataError, match=r"schema.json: no schema"):
        DataFolder.of(folder)


@pytest.mark.parametrize(
    ("column", "unit"),
    [
        (pa.array([T0, T0 + 1], pa.int64()), "s"),
        (pa.array([T0 * 1000, T0 * 1000 + 1999]), "ms"),
        (pa.array([T0 * 10**6, T0 * 10**6 + 1999999]), "us"),
        (pa.array([T0 * 10**9, T0 * 10**9 + 1999999999]), "ns"),
        (pa.array([T0, T0 + 1], pa.uint64()), "s"),
        (pa.array([T0 + 0.5, T0 + 1.9]), "s"),
        *(
            (pa.array([T0, T0 + 1]).cast(pa.timestamp("s")).cast(pa.timestamp(unit)), "s")
            for unit in ("s", "ms", "us", "ns")
        ),
        (pa.array([T0, T0 + 1]).cast(pa.timestamp("s", tz="Europe/Berlin")), "s"),
    ],
)
def test_times_of_every_kind_are_seconds(column, unit):
    assert seconds(column, unit).tolist() == [T0, T0 + 1]


def test_dates_and_times_before_1970():
    days = [dt.date(1970, 1, 2), dt.date(1969, 12, 31)]
    for kind in (pa.date32(), pa.date64()):
        assert seconds(pa.array(days, kind), "s").tolist() == [DAY, -DAY]
    assert seconds(pa.array([-1500], pa.timestamp("ms")), "s").tolist() == [-2]
    assert seconds(pa.array([0, 5]), "s").tolist() == [0, 5]  # a clock of its own


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (T0 * 1000, "s", "cannot be seconds, it looks like milliseconds: --time-unit ms"),
        (T0 * 10**9, "s", "nanoseconds: --time-unit ns"),
        (T0 * 10**6, "ms", "microseconds: --time-unit us"),
        (T0, "ms", "cannot be milliseconds, it looks like seconds: --time-unit s"),
        (float("inf"), "s", "not finite"),
    ],
)
def test_units_that_cannot_be_are_refused(value, unit, said):
    with pytest.raises(ValueError, match=said):
        seconds(pa.array([5, value]), unit)


def test_a_wrong_unit_is_named_by_file_and_row(folder):
    table = events_table()
    pq.write_table(
        table.set_column(2, "timestamp", pa.array(table["timestamp"].to_numpy() * 1000)), folder / "events.parquet"
    )
    with pytest.raises(DataError, match=r"events.parquet: column 'timestamp', row 0 and after: .*--time-unit ms"):
        read(folder)
    assert read(DataFolder.of(folder, DataSchema(time_unit="ms"))) == EXPECTED


@pytest.mark.parametrize(
    "column",
    [
        pa.FixedSizeListArray.from_arrays(pa.array([1, 2, 3, 4], pa.int8()), 2),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64())),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.large_list(pa.float32())),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_view(pa.float32())),
        pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8())),
        pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float16(), 2)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1, 2], [3, 4]], np.float32)),
        pa.FixedShapeTensorArray.from_numpy_ndarray(np.array([[1, 2], [3, 4]], np.int16)),
    ],
    ids=lambda column: str(column.type)[:40],
)
def test_embeddings_of_every_kind(column, tmp_path):
    pq.write_table(pa.table({"item_id": [5, 6], "emb": column}), tmp_path / "items.parquet")
    items = open_items(tmp_path, sources=["emb"], targets=())
    assert items.source_dims == {"emb": 2}
    (batch,) = items.batches()
    assert batch.sources["emb"].tolist() == [[1, 2], [3, 4]]


def test_lists_of_integers_are_categories_unless_they_are_named(tmp_path):
    tags = pa.array([[1, 2], [3, 4]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"item_id": [5, 6], "tags": tags}), tmp_path / "items.parquet")
    assert open_items(tmp_path).categorical == ("tags",)
    assert open_items(tmp_path, sources=["tags"]).source_dims == {"tags": 2}


def test_pandas_indices_are_passed_over(tmp_path):
    table = items_table().append_column("__index_level_0__", pa.array([7] * 5))
    pq.write_table(table, tmp_path / "items.parquet")
    pq.write_table(events_table().append_column("__index_level_0__", pa.array([7] * 12)), tmp_path / "events.parquet")
    pq.write_table(pa.table({"user_id": [0], "__index_level_0__": [3], "age": [5]}), tmp_path / "users.parquet")
    assert open_items(tmp_path).categorical == ()
    assert open_users(tmp_path).categorical == ("age",)
    assert validate(tmp_path)["unread"]["events"] == {"__index_level_0__": "int64: a pandas index"}


def test_user_columns_are_chosen(folder):
    users = pa.table({"user_id": [0, 1, 2], "age": [1, 2, 3], "postcode": ["a", "b", "c"], "height": [0.1, 0.2, 0.3]})
    pq.write_table(users, folder / "users.parquet")
    assert open_users(DataFolder.of(folder, DataSchema(user_columns=("age",)))).categorical == ("age",)
    with pytest.raises(DataError, match="no user column 'size'"):
        open_users(DataFolder.of(folder, DataSchema(user_columns=("size",))))
    chosen = open_users(DataFolder.of(folder, DataSchema(user_columns=("age", "height"))))
    assert chosen.categorical == ("age",) and [named.column for named in chosen.dense] == ["height"]
    with pytest.raises(DataError, match="column 'postcode' is string; a dense feature holds numbers"):
        open_users(DataFolder.of(folder, DataSchema(user_columns=("postcode:dense",))))


def test_all_that_is_wrong_is_said_at_once(folder):
    table = events_table()
    table = table.set_column(1, "item_id", pa.array([0] * 3 + [None] + [0] * 8, pa.int64()))
    table = table.set_column(3, "label", pa.array([0, 1, 7] + [0] * 9, pa.int8()))
    pq.write_table(table, folder / "events.parquet")
    items = items_table().append_column("other", pa.array([[1.0], [2.0], [float("nan")], [1.0], [1.0]]))
    bad = pa.FixedSizeListArray.from_arrays(pa.array([1, float("inf")] * 5, pa.float32()), 2)
    pq.write_table(items.set_column(1, "emb", bad), folder / "items.parquet")
    with pytest.raises(DataError) as caught:
        validate(folder)
    said = str(caught.value)
    assert said.startswith("4 problems:\n  ")
    for part in (
        "column 'emb', row 0",
        "column 'other', row 2",
        "column 'item_id', row 3: null",
        "column 'label', row 2: 7",
    ):
        assert part in said


def test_items_alone_are_valid(folder):
    summary = validate(folder)
    assert (summary["items"], summary["events"], summary["users"]) == (5, None, None)
    with pytest.raises(DataError, match="events.parquet: no such file"):
        validate(folder, tasks=("label",))


def test_what_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no file has a name like this; quote the pattern"):
        open_table(DataFolder.of(tmp_path, DataSchema(events="x-*.parquet")), "events")
    (tmp_path / "events").mkdir()
    with pytest.raises(DataError, match=r"events: no file \*.parquet in this folder"):
        open_events(tmp_path)
    pq.write_table(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), tmp_path / "items.parquet")
    with pytest.raises(DataError, match="two columns are called 'a'; rename one"):
        open_items(tmp_path)


def test_embeddings_of_a_second_file(folder):
    """In another order, of part of the items, and of others; as if they were in the first."""
    x_ND = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    ids = [3, 99, 0, 4]
    second = pa.table({"key": ids, "image": list(x_ND), "emb": [[0.0]] * 4})
    pq.write_table(second, folder / "vectors.parquet")
    data = DataFolder.of(folder, DataSchema(embeddings="vectors.parquet", columns=("item_id=key",)))
    with pytest.raises(DataError, match=r"vectors.parquet: column 'emb' is in .*items.parquet, too; rename one"):
        open_items(data)
    pq.write_table(second.drop_columns("emb"), folder / "vectors.parquet")
    items = open_items(data)
    assert items.source_dims == {"emb": 2, "image": 3}
    expected = np.zeros((5, 3), np.float32)
    expected[[3, 0, 4]] = x_ND[[0, 2, 3]]
    for share in ((0, 1), (0, 2)):
        for batch in items.batches(2, share=share):
            own = expected[batch.first_row :][: len(batch)]
            np.testing.assert_array_equal(batch.sources["image"], own)
            np.testing.assert_array_equal(batch.present["image"], own.any(1))
            assert batch.sources["emb"].tolist() == [[2 * i + 1, 2 * i + 2] for i in batch.item_ids.to_pylist()]
    assert folder / "vectors.parquet" in data.files("items")
    assert validate(data)["sources"]["image"] == {"dim": 3, "missing": 2}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"key": [3, 3, 0, 4]},
            "column 'key', row 1: item_id 3 is already in row 0|column 'key', row 1: key 3 is already",
        ),
        ({"key": [9, 8, 7, 6]}, "no item_id of it is among the items"),
        ({"key": ["a", "b", "c", "d"]}, "write both with one type"),
        ({"image": [[1.0], [2.0, 3.0], [1.0], [1.0]]}, r"column 'image', row 1 \(item_id 99\): 2 values, expected 1"),
        ({"image": [[1.0], [1.0], [1.0], [float("nan")]]}, r"column 'image', row 3 \(item_id 4\): value 0 is nan"),
    ],
)
def test_bad_second_files(change, words, folder):
    columns = {"key": [3, 99, 0, 4], "image": [[1.0]] * 4} | change
    pq.write_table(pa.table(columns), folder / "vectors.parquet")
    data = DataFolder.of(folder, DataSchema(embeddings="vectors.parquet", columns=("item_id=key",)))
    with pytest.raises(DataError, match=words):
        list(open_items(data).batches())


def test_users_of_another_type_of_id_are_refused(folder):
    """Text that looks like the log's numbers is not taken for them."""
    pq.write_table(events_table(), folder / "events.parquet")
    pq.write_table(pa.table({"user_id": ["0", "1"], "age": [1, 2]}), folder / "users.parquet")
    for read_all in (validate, lambda data: prepare(data, folder / "out", PrepareConfig())):
        with pytest.raises(
            DataError, match=r"users.parquet: column 'user_id' holds large_string, .* int64; write both"
        ):
            read_all(folder)


def test_text_that_is_not_utf8_is_named(folder):
    ids = pa.Array.from_buffers(pa.string(), 12, pa.array([b"a"] * 11 + [b"\xff"], pa.binary()).buffers())
    pq.write_table(events_table().set_column(0, "user_id", ids), folder / "events.parquet")
    with pytest.raises(
        DataError, match="column 'user_id', row 10 and after: an id is not UTF-8; make it a column of bytes"
    ):
        read(folder)
