"""The readers against files written by hand: what comes out, and what each kind of bad file is answered."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.data.columns import vector_lists
from sidrec_torchrec.data.format import (
    Vocabulary,
    open_events,
    open_items,
    open_users,
    scan_vocabularies,
    validate,
)
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.jobs import data_validate

# pyarrow before 26 cannot read a null among lists of fixed size
fixed = pa.list_ if int(pa.__version__.split(".")[0]) >= 26 else lambda kind, size: pa.list_(kind)

IDS = [10, 20, 30, 40, 50]
TEXT = [[1.0, 2.0], None, [0.0, 0.0], [-0.5, 0.25], [3.0, 0.0]]
IMAGE = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], None, [0.5, 0.5, 0.5]]


def item_columns() -> dict[str, pa.Array]:
    return {
        "item_id": pa.array(IDS, pa.int64()),
        "text_emb": pa.array(TEXT, fixed(pa.float16(), 2)),
        "image_emb": pa.array(IMAGE, pa.list_(pa.float32())),
        "category": pa.array(["b", "a", None, "b", "c"], pa.string()),
        "tags": pa.array([["x", "y"], [], None, ["y"], ["z", "y", "z"]], pa.list_(pa.string())),
        "year": pa.array([1999, 2001, 1999, None, 2001], pa.int32()),
        "price": pa.array([1.0, 2.0, 3.0, 4.0, 5.0], pa.float64()),
    }


def event_columns() -> dict[str, pa.Array]:
    return {
        "user_id": pa.array([1, 2, 1, 2, 1], pa.int64()),
        "item_id": pa.array([10, 10, 20, 30, 50], pa.int64()),
        "timestamp": pa.array([5, 1, 5, 2, 9], pa.int64()),
        "label": pa.array([1, 0, 0, 1, 1], pa.int8()),
        "rating": pa.array([4.5, 2.0, 1.0, 5.0, 4.0], pa.float32()),
    }


def user_columns() -> dict[str, pa.Array]:
    return {
        "user_id": pa.array([2, 1, 7], pa.int64()),
        "age": pa.array([25, 35, 25], pa.int64()),
        "height": pa.array([1.8, 1.7, None], pa.float64()),
    }


def write(path: Path, columns: dict[str, pa.Array], *, row_group_size: int = 2) -> Path:
    """Small row groups, so that every reader crosses several."""
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "items.parquet", item_columns())
    write(tmp_path / "events.parquet", event_columns())
    write(tmp_path / "users.parquet", user_columns())
    return tmp_path


def error(action) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


# ---------------------------------------------------------------- items


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_items_read_the_same_in_batches_of_any_size(folder: Path, batch_size: int) -> None:
    items = open_items(folder)
    batches = list(items.batches(batch_size))

    assert items.path == folder / "items.parquet"
    assert items.num_items == 5
    assert items.source_dims == {"text_emb": 2, "image_emb": 3}
    assert items.categorical == ("category", "tags", "year")  # price is neither a source nor a category
    assert max(map(len, batches)) <= batch_size
    assert [b.first_row for b in batches] == list(np.cumsum([0] + [len(b) for b in batches[:-1]]))
    assert np.concatenate([b.item_ids for b in batches]).tolist() == IDS
    text = np.concatenate([b.sources["text_emb"] for b in batches])
    assert text.dtype == np.float32
    np.testing.assert_array_equal(text, [row or [0, 0] for row in TEXT])
    np.testing.assert_array_equal(
        np.concatenate([b.sources["image_emb"] for b in batches]), [row or [0, 0, 0] for row in IMAGE]
    )
    years = [year for b in batches for year in b.targets["year"].to_pylist()]
    assert years == [1999, 2001, 1999, None, 2001]


def test_null_and_all_zero_vectors_are_missing(folder: Path) -> None:
    (batch,) = open_items(folder).batches()
    assert batch.present["text_emb"].tolist() == [True, False, False, True, True]
    assert batch.present["image_emb"].tolist() == [True, True, True, False, True]


def test_empty_list_is_a_missing_vector(tmp_path: Path) -> None:
    path = write(tmp_path / "i.parquet", {"item_id": pa.array([1, 2]), "e": pa.array([[], [1.0, 2.0]])})
    (batch,) = open_items(path).batches()
    assert batch.present["e"].tolist() == [False, True]
    assert batch.sources["e"].tolist() == [[0.0, 0.0], [1.0, 2.0]]


@pytest.mark.skipif(fixed is not pa.list_, reason="pyarrow before 26 cannot read it")
def test_what_lies_beneath_a_null_vector_is_not_read(tmp_path: Path) -> None:
    masked = pa.FixedSizeListArray.from_arrays(pa.array([9.0, 9.0, 1.0, 2.0]), 2, mask=pa.array([True, False]))
    path = write(tmp_path / "i.parquet", {"item_id": pa.array([1, 2]), "e": masked})
    (batch,) = open_items(path).batches()
    assert batch.sources["e"].tolist() == [[0.0, 0.0], [1.0, 2.0]]


def test_vectors_that_are_written_have_no_fixed_size_which_old_pyarrow_cannot_read(tmp_path: Path) -> None:
    x_ND = np.arange(12, dtype=np.float16).reshape(4, 3)
    column = vector_lists(x_ND, np.array([True, False, True, False]))
    assert column.type == pa.list_(pa.float16())
    assert column.to_pylist() == [[0, 1, 2], None, [6, 7, 8], None]
    write_synthetic(SyntheticConfig(items=200, users=2, missing=0.5), tmp_path)
    schema = pq.read_schema(tmp_path / "items.parquet")
    assert not [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]
    assert 0 < pq.read_table(tmp_path / "items.parquet")["text_emb"].null_count < 200


def test_what_old_pyarrow_cannot_read_is_said(tmp_path: Path, monkeypatch) -> None:
    def fail(*_, **__):
        raise pa.ArrowInvalid("Expected all lists to be of size=3 but index 2 had size=0")

    path = write(
        tmp_path / "i.parquet", {"item_id": pa.array([1]), "e": pa.array([[1.0, 2.0]], pa.list_(pa.float32(), 2))}
    )
    items = open_items(path)
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", fail)
    assert "write lists of no fixed size, or take pyarrow 26" in error(lambda: list(items.batches()))


def test_only_named_columns_are_opened(folder: Path) -> None:
    items = open_items(folder / "items.parquet", sources=["image_emb"], targets=["year", "tags"])
    (batch,) = items.batches()
    assert items.source_dims == {"image_emb": 3}
    assert list(batch.sources) == ["image_emb"]
    assert list(batch.targets) == ["year", "tags"]
    (bare,) = items.batches(sources=(), targets=())
    assert bare.sources == bare.targets == {}


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.none() | st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3), min_size=1, max_size=12
    ),
    kind=st.sampled_from(
        [fixed(pa.float16(), 3), fixed(pa.float32(), 3), pa.list_(pa.float32()), pa.large_list(pa.float64())]
    ),
    batch_size=st.integers(1, 5),
)
def test_vectors_round_trip(tmp_path_factory, rows, kind, batch_size) -> None:
    path = tmp_path_factory.mktemp("round") / "items.parquet"
    write(path, {"item_id": pa.array(range(len(rows)), pa.int64()), "e": pa.array(rows, kind)}, row_group_size=3)
    if not pa.types.is_fixed_size_list(kind) and all(row is None for row in rows):
        assert "column 'e' holds no vector in any row" in error(lambda: open_items(path))
        return
    batches = list(open_items(path).batches(batch_size))
    expected = np.array([row if row is not None else [0, 0, 0] for row in rows], np.float32)
    np.testing.assert_array_equal(np.concatenate([b.sources["e"] for b in batches]), expected)
    np.testing.assert_array_equal(np.concatenate([b.present["e"] for b in batches]), (expected != 0).any(1))


def test_row_groups_are_read_in_the_order_asked_for(folder: Path) -> None:
    items = open_items(folder)  # five rows, two a group
    assert items.table.num_row_groups == 3
    batches = list(items.batches(10, row_groups=[2, 0]))
    assert [(batch.first_row, batch.item_ids.tolist()) for batch in batches] == [(4, [50]), (0, [10, 20])]
    assert [batch.first_row for batch in items.batches(1, row_groups=[1])] == [2, 3]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    columns = item_columns()
    columns["text_emb"] = pa.array(TEXT[:3] + [[1.0, value]] + TEXT[4:], fixed(pa.float16(), 2))
    path = write(tmp_path / "items.parquet", columns)
    message = error(lambda: list(open_items(path).batches(2)))
    assert message.startswith(f"{path}: column 'text_emb', row 3 (item_id 40): value 1 is {value}")


def test_null_inside_a_vector_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "i.parquet", {"item_id": pa.array([1, 2]), "e": pa.array([[1.0, 2.0], [None, 1.0]])})
    assert "column 'e', row 1 (item_id 2): value 0 is nan" in error(lambda: list(open_items(path).batches()))


def test_wrong_width_is_named(tmp_path: Path) -> None:
    columns = item_columns()
    columns["image_emb"] = pa.array(IMAGE[:4] + [[0.5, 0.5]], pa.list_(pa.float32()))
    path = write(tmp_path / "items.parquet", columns)
    message = error(lambda: list(open_items(path).batches(3)))
    assert message == f"{path}: column 'image_emb', row 4 (item_id 50): 2 values, expected 3 as in the rows before"


def test_unknown_column_lists_those_there_are(folder: Path) -> None:
    path = folder / "items.parquet"
    assert error(lambda: open_items(folder, sources=["audio_emb"])) == (
        f"{path}: no source 'audio_emb'; available: 'text_emb', 'image_emb'"
    )
    assert error(lambda: open_items(folder, targets=["genre"])) == (
        f"{path}: no target 'genre'; available: 'category', 'tags', 'year'"
    )
    message = error(lambda: open_items(folder, sources=["price"]))
    assert message.startswith(f"{path}: column 'price' of type double cannot be a source")
    items = open_items(folder, sources=["text_emb"])
    assert "column 'image_emb' of type" in error(lambda: next(items.batches(sources=["image_emb"])))


def test_repeated_item_id_is_named(tmp_path: Path) -> None:
    columns = item_columns() | {"item_id": pa.array([10, 20, 30, 20, 10], pa.int64())}
    path = write(tmp_path / "items.parquet", columns)
    message = error(lambda: next(open_items(path).batches()))
    assert message == (
        f"{path}: column 'item_id', row 3: item_id 20 is already in row 1; ids must be unique (2 repeats in all)"
    )


def test_null_item_id_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "items.parquet", item_columns() | {"item_id": pa.array([1, 2, 3, None, 5], pa.int64())})
    assert error(lambda: open_items(path).ids()).startswith(f"{path}: column 'item_id', row 3: null")


def test_item_id_of_another_type_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "items.parquet", item_columns() | {"item_id": pa.array([0.5, 1.5, 2.5, 3.5, 4.5])})
    assert error(lambda: open_items(path)).startswith(
        f"{path}: column 'item_id' is double; ids are integers, strings or"
    )


# ---------------------------------------------------------------- files


def test_missing_file(tmp_path: Path) -> None:
    assert error(lambda: open_items(tmp_path)).startswith(f"{tmp_path / 'items.parquet'}: no such file")
    assert error(lambda: open_events(tmp_path)).startswith(f"{tmp_path / 'events.parquet'}: no such file")
    assert open_users(tmp_path) is None  # the one optional file


def test_truncated_file(folder: Path) -> None:
    path = folder / "events.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    assert error(lambda: open_events(folder)).startswith(f"{path}: not a Parquet file, or cut short")


def test_damaged_pages(tmp_path: Path) -> None:
    path = tmp_path / "events.parquet"
    columns = {name: pa.array(np.arange(5000)) for name in ("user_id", "item_id", "timestamp")}
    pq.write_table(pa.table(columns), path, row_group_size=1000, use_dictionary=False, compression="zstd")
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 4000] = bytes(4000)
    path.write_bytes(raw)
    assert f"{path}: cannot be read past row" in error(lambda: list(open_events(path).batches(100)))


def test_file_without_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "items.parquet", {name: column[:0] for name, column in item_columns().items()})
    assert error(lambda: open_items(path)) == f"{path}: the file has no rows"


# ---------------------------------------------------------------- vocabulary


def test_single_label(folder: Path) -> None:
    vocabulary = Vocabulary.scan(open_items(folder), "category")
    assert vocabulary == Vocabulary("category", ("a", "b", "c"), multi_label=False)
    labels, mask = vocabulary.encode(pa.array(["c", None, "unseen", "a"]))
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, -1, -1, 0]
    assert mask.tolist() == [True, False, False, True]


def test_multi_label(folder: Path) -> None:
    items = open_items(folder)
    vocabulary = Vocabulary.scan(items, "tags")
    assert vocabulary == Vocabulary("tags", ("x", "y", "z"), multi_label=True)
    for size in (1, 2, 5):  # slices of one array keep offsets of their own
        parts = [vocabulary.encode(b.targets["tags"]) for b in items.batches(size, sources=())]
        hot = np.concatenate([labels for labels, _ in parts])
        assert hot.dtype == np.float32
        assert hot.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 1, 1]]
        assert np.concatenate([mask for _, mask in parts]).tolist() == [True, False, False, True, True]
    column = pa.array([["x"], ["y"], ["unseen", "z"], ["unseen"]])[1:]
    hot, mask = vocabulary.encode(column)
    assert hot.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert mask.tolist() == [True, True, False]


def test_integers_and_dictionaries(folder: Path, tmp_path: Path) -> None:
    vocabulary = Vocabulary.scan(open_items(folder), "year")
    assert vocabulary.values == (1999, 2001)
    assert vocabulary.encode(pa.array([2001, None, 5], pa.int16()))[0].tolist() == [1, -1, -1]
    coded = pa.array(["q", "p", None, "q"]).dictionary_encode()
    path = write(tmp_path / "coded.parquet", {"item_id": pa.array([1, 2, 3, 4]), "c": coded}, row_group_size=4)
    (batch,) = open_items(path).batches()
    vocabulary = Vocabulary.scan(open_items(path), "c")
    assert vocabulary.values == ("p", "q")
    assert vocabulary.encode(batch.targets["c"])[0].tolist() == [1, 0, -1, 1]


def test_vocabulary_round_trip_through_json(folder: Path) -> None:
    for vocabulary in scan_vocabularies(open_items(folder), ["category", "tags", "year"]).values():
        assert Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json()))) == vocabulary


def test_vocabulary_errors(folder: Path) -> None:
    items, path = open_items(folder), folder / "items.parquet"
    assert error(lambda: Vocabulary.scan(items, "category", max_classes=2)).startswith(
        f"{path}: column 'category' has more than 2 distinct values"
    )
    assert Vocabulary.scan(items, "category", max_classes=3).values == ("a", "b", "c")
    assert f"{path}: column 'price' is double" in error(lambda: Vocabulary.scan(items, "price"))
    assert f"{path}: no column 'genre'; the file has 'item_id' (int64)" in error(
        lambda: Vocabulary.scan(items, "genre")
    )
    vocabulary = Vocabulary.scan(items, "tags")
    assert "column 'tags' is string; its vocabulary was made from lists of strings" in error(
        lambda: vocabulary.encode(pa.array(["x"]))
    )
    empty = write(folder / "empty.parquet", {"item_id": pa.array([1]), "tags": pa.array([[]], pa.list_(pa.string()))})
    assert "column 'tags' has no value in any row" in error(lambda: Vocabulary.scan(open_items(empty), "tags"))


# ---------------------------------------------------------------- events and users


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_events_read_the_same_in_batches_of_any_size(folder: Path, batch_size: int) -> None:
    events = open_events(folder)
    batches = list(events.batches(batch_size))
    assert events.num_events == 5
    assert events.tasks == ("label",)
    columns = event_columns()
    for field, name in (("user_ids", "user_id"), ("item_ids", "item_id"), ("timestamps", "timestamp")):
        values = np.concatenate([getattr(b, field) for b in batches])
        assert values.dtype == np.int64
        assert values.tolist() == columns[name].to_pylist()
    labels = np.concatenate([b.labels for b in batches])
    assert labels.dtype == np.int8
    assert labels.tolist() == [[1], [0], [0], [1], [1]]


def test_events_without_labels(folder: Path) -> None:
    columns = event_columns()
    del columns["label"]
    write(folder / "events.parquet", columns)
    events = open_events(folder)
    assert events.tasks == ()
    assert next(events.batches()).labels.shape == (5, 0)
    assert validate(folder)["labels"] == {}


def test_bool_labels(folder: Path) -> None:
    write(folder / "events.parquet", event_columns() | {"label": pa.array([True, False, False, True, True])})
    assert next(open_events(folder).batches()).labels[:, 0].tolist() == [1, 0, 0, 1, 1]


def test_event_errors(folder: Path) -> None:
    path = folder / "events.parquet"

    def attempt(**changes: pa.Array | None) -> str:
        columns = {name: column for name, column in (event_columns() | changes).items() if column is not None}
        write(path, columns)
        return error(lambda: list(open_events(folder).batches(2)))

    message = attempt(timestamp=None)
    assert message.startswith(
        f"{path}: no required column 'timestamp'; the file has 'user_id' (int64), 'item_id' (int64)"
    )
    assert attempt(user_id=pa.array([0.5] * 5)).startswith(f"{path}: column 'user_id' is double; ids are integers,")
    assert attempt(item_id=pa.array([10, 20, 20, 30, None], pa.int64())).startswith(
        f"{path}: column 'item_id', row 4: null"
    )
    assert attempt(label=pa.array([0, 1, 1, 2, 0], pa.int8())) == (
        f"{path}: column 'label', row 3: 2; a label is 0 or 1"
    )
    assert attempt(label=pa.array([0, 1, 1, None, 0], pa.int8())).startswith(f"{path}: column 'label', row 3: null")
    assert attempt(label=pa.array([0.5] * 5)) == f"{path}: column 'label', row 0: 0.5; a label is 0 or 1"
    for only in (0, 1):
        assert attempt(label=pa.array([only] * 5, pa.int8())).startswith(
            f"{path}: column 'label' is {only} in all 5 rows; a ranker needs both classes"
        )


def test_users(folder: Path) -> None:
    users = open_users(folder)
    assert (users.num_users, users.categorical) == (3, ("age",))
    batches = list(users.batches(2))
    assert np.concatenate([b.user_ids for b in batches]).tolist() == [2, 1, 7] == users.ids().tolist()
    vocabulary = Vocabulary.scan(users, "age")
    assert vocabulary.values == (25, 35)
    assert np.concatenate([vocabulary.encode(b.columns["age"])[0] for b in batches]).tolist() == [0, 1, 0]
    assert "column 'height' is double, not categorical" in error(lambda: next(users.batches(columns=["height"])))


def test_repeated_user_is_named(folder: Path) -> None:
    write(folder / "users.parquet", user_columns() | {"user_id": pa.array([2, 1, 2], pa.int64())})
    assert "column 'user_id', row 2: user_id 2 is already in row 0" in error(lambda: next(open_users(folder).batches()))


# ---------------------------------------------------------------- validate


def test_summary_of_a_valid_folder(folder: Path, capsys) -> None:
    assert validate(folder) == {
        "items": 5,
        "sources": {"text_emb": {"dim": 2, "missing": 2}, "image_emb": {"dim": 3, "missing": 1}},
        "missing_categories": {"category": 1, "tags": 2, "year": 1},
        "unread": {
            "items": {"price": "double: neither a source (a list of numbers) nor a target (a category)"},
            "users": {"height": "double: not a category"},
            "events": {"rating": "float: not named as a task"},
        },
        "items_without_events": 1,
        "events": 5,
        "met": {
            "unknown_items": {"count": 0, "policy": "refuse"},
            "unsorted": {"count": 0, "policy": "refuse"},
            "duplicates": {"count": 0, "policy": "keep"},
            "short_users": {"count": 0, "policy": "drop"},
        },
        "labels": {"label": {"rate": 0.6, "missing": 0}},
        "users": 2,
        "history": {"p50": 2, "p90": 2, "max": 3},
        "users_without_row": 0,
    }
    data_validate.main(data_validate.DataValidateConfig(data=folder))
    printed = capsys.readouterr().out
    assert "2 wide, 2 missing" in printed
    assert "0.6000" in printed


def test_unknown_items_are_counted_and_the_first_is_named(folder: Path) -> None:
    items = pa.array([10, 99, 20, 98, 99], pa.int64())
    path = write(folder / "events.parquet", event_columns() | {"item_id": items})
    message = error(lambda: validate(folder))
    assert message.startswith(
        f"{path}: column 'item_id', row 1: item_id 99 is not in {folder / 'items.parquet'}; 3 of 5"
    )


def test_time_running_backwards_is_named(folder: Path) -> None:
    times = pa.array([5, 1, 4, 2, 9], pa.int64())
    path = write(folder / "events.parquet", event_columns() | {"timestamp": times})
    assert error(lambda: validate(folder)).startswith(
        f"{path}: column 'timestamp', row 2: time of user_id 1 goes back from 5 to 4"
    )


def test_time_running_backwards_is_seen_across_batches(tmp_path: Path) -> None:
    """The default batch holds 2^18 events: user 1 comes back after that many, one second early."""
    num = (1 << 18) + 3
    users = np.r_[1, np.arange(2, num), 1]
    times = np.r_[100, np.zeros(num - 2, np.int64), 99]
    write(tmp_path / "items.parquet", item_columns())
    columns = {"user_id": users, "item_id": np.full(num, 10), "timestamp": times}
    path = write(tmp_path / "events.parquet", columns, row_group_size=1 << 16)
    assert error(lambda: validate(tmp_path)).startswith(
        f"{path}: column 'timestamp', row {num - 1}: time of user_id 1 goes back from 100 to 99"
    )


def test_missing_folder(tmp_path: Path) -> None:
    assert error(lambda: validate(tmp_path / "none")).startswith(f"{tmp_path / 'none'}: no such folder")


def test_users_without_a_row_are_counted(folder: Path) -> None:
    write(folder / "users.parquet", {"user_id": pa.array([2], pa.int64())})
    assert validate(folder)["users_without_row"] == 1
