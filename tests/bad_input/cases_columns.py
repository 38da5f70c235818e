"""Columns of a data folder: their types and values."""

import pyarrow as pa

from tests.bad_input.kinds import Kind
from tests.bad_input.spoils import (
    EVENTS,
    ITEMS,
    PREPARE,
    TRAIN,
    USERS,
    VALIDATE,
    column,
    doubled,
    events_backwards,
    few,
    ragged,
    twice,
    vector,
    without,
)

CASES = [
    *(
        Kind(
            f"{file} without '{name}'", VALIDATE, f"no required column '{name}'", without(f"data/{file}.parquet", name)
        )
        for file, name in (
            ("items", "item_id"),
            ("events", "item_id"),
            ("events", "user_id"),
            ("events", "timestamp"),
            ("users", "user_id"),
        )
    ),
    *(
        Kind(
            f"a null '{name}' in {file}",
            VALIDATE,
            f"column '{name}', row 0: null",
            column(f"data/{file}.parquet", name, None, first_only=True),
        )
        for file, name in (
            ("items", "item_id"),
            ("events", "item_id"),
            ("events", "user_id"),
            ("events", "timestamp"),
            ("events", "label"),
            ("users", "user_id"),
        )
    ),
    Kind("an item twice", VALIDATE, "is already in row 0", doubled(ITEMS)),
    Kind("an item twice, in train-tokenizer", TRAIN, "is already in row 0", doubled(ITEMS)),
    Kind("a user twice", VALIDATE, "is already in row 0", doubled(USERS)),
    Kind("two columns of one name", VALIDATE, "two columns are called 'item_id'; rename one", twice(ITEMS, "item_id")),
    Kind(
        "two columns of one name in events",
        VALIDATE,
        "two columns are called 'label'; rename one",
        twice(EVENTS, "label"),
    ),
    Kind("ids of floats", VALIDATE, "column 'item_id' is double; ids are", column(ITEMS, "item_id", 0.5)),
    Kind("ids of booleans", VALIDATE, "column 'item_id' is bool; ids are", column(ITEMS, "item_id", True)),
    Kind("ids of lists", VALIDATE, "column 'user_id' is list<element: int64>; ids are", column(EVENTS, "user_id", [1])),
    Kind(
        "ids of structs", VALIDATE, "column 'user_id' is struct<a: int64>; ids are", column(EVENTS, "user_id", {"a": 1})
    ),
    Kind("ids of nothing but null", VALIDATE, "column 'item_id' is null; ids are", column(EVENTS, "item_id", None)),
    Kind(
        "ids that are not UTF-8",
        VALIDATE,
        "an id is not UTF-8",
        column(ITEMS, "item_id", pa.array([b"\xff\xfe" + bytes([i]) for i in range(60)]).view(pa.string())),
    ),
    Kind(
        "a dictionary of ids with nulls",
        VALIDATE,
        "null; every row needs a value",
        column(EVENTS, "user_id", pa.array(["u", None]).dictionary_encode()),
    ),
    Kind("ids of text where items have numbers", VALIDATE, "item_id", column(EVENTS, "item_id", "1")),
    Kind(
        "users of text where events have numbers",
        VALIDATE,
        "write both with one type",
        column(USERS, "user_id", pa.array([str(i) for i in range(40)])),
    ),
    Kind(
        "users of text where events have numbers, in prepare",
        PREPARE,
        "write both with one type",
        column(USERS, "user_id", pa.array([str(i) for i in range(40)])),
    ),
    Kind("ids beyond int64", VALIDATE, "item_id", column(EVENTS, "item_id", pa.array([2**64 - 1], pa.uint64()))),
    Kind(
        "an item that is not there",
        VALIDATE,
        "is not in data/items.parquet",
        column(EVENTS, "item_id", 10**9, first_only=True),
    ),
    Kind(
        "an item that is not there, in prepare",
        PREPARE,
        "is not in data/items.parquet",
        column(EVENTS, "item_id", 10**9, first_only=True),
    ),
    Kind(
        "times of text", VALIDATE, "column 'timestamp' is string; times are", column(EVENTS, "timestamp", "yesterday")
    ),
    Kind(
        "times of lists",
        VALIDATE,
        "column 'timestamp' is list<element: int64>; times are",
        column(EVENTS, "timestamp", [1]),
    ),
    Kind("times that are NaN", VALIDATE, "a time is not finite", column(EVENTS, "timestamp", float("nan"))),
    Kind("times that are infinite", VALIDATE, "a time is not finite", column(EVENTS, "timestamp", float("inf"))),
    Kind("times beyond int64 as numbers", VALIDATE, "timestamp", column(EVENTS, "timestamp", 1e30)),
    Kind(
        "times beyond int64 as uint64",
        VALIDATE,
        "timestamp",
        column(EVENTS, "timestamp", pa.array([2**64 - 1], pa.uint64())),
    ),
    Kind("times in milliseconds", VALIDATE, "--time-unit ms", column(EVENTS, "timestamp", 1_700_000_000_000)),
    Kind(
        "seconds called nanoseconds",
        VALIDATE + " --time-unit ns",
        "--time-unit s",
        column(EVENTS, "timestamp", 1_700_000_000),
    ),
    Kind(
        "dates written as numbers",
        VALIDATE,
        "looks like a date written as a number",
        column(EVENTS, "timestamp", 20_240_131),
    ),
    Kind("an unknown unit of time", VALIDATE + " --time-unit h", "--schema.time-unit: must be one of"),
    Kind("times that go backwards", VALIDATE, "goes back from", lambda f: f.table(EVENTS, events_backwards)),
    Kind("times that go backwards, in prepare", PREPARE, "goes back from", lambda f: f.table(EVENTS, events_backwards)),
    Kind(
        "a label of 2",
        VALIDATE,
        "column 'label', row 0: 2; a label is 0 or 1",
        column(EVENTS, "label", 2, first_only=True),
    ),
    Kind(
        "a label of -1",
        VALIDATE,
        "column 'label', row 0: -1; a label is 0 or 1",
        column(EVENTS, "label", -1, first_only=True),
    ),
    Kind("labels of halves", VALIDATE, "column 'label', row 0: 0.5; a label is 0 or 1", column(EVENTS, "label", 0.5)),
    Kind(
        "labels that are NaN",
        VALIDATE,
        "column 'label', row 0: nan; a label is 0 or 1",
        column(EVENTS, "label", float("nan")),
    ),
    Kind("labels of text", VALIDATE, "column 'label' is string; labels are", column(EVENTS, "label", "yes")),
    Kind(
        "labels that are all 1",
        VALIDATE,
        "column 'label' is 1 in all",
        column(EVENTS, "label", pa.array([1], pa.int8())),
    ),
    Kind("labels that are all 0, in prepare", PREPARE, "label", column(EVENTS, "label", pa.array([0], pa.int8()))),
    Kind("a task without a column", PREPARE + " --tasks like", "like"),
    Kind("vectors with NaN", VALIDATE, "column 'text_emb', row 0", vector(float("nan"))),
    Kind("vectors with NaN, in train-tokenizer", TRAIN, "column 'text_emb', row 0", vector(float("nan"))),
    Kind("vectors with infinity", VALIDATE, "column 'text_emb', row 0", vector(float("inf"))),
    Kind("vectors beyond float32", VALIDATE, "column 'text_emb', row 0", vector(1e300)),
    Kind("vectors of two widths", VALIDATE, "column 'text_emb', row 3", ragged),
    Kind(
        "vectors that are all null",
        VALIDATE,
        "holds no vector in any row",
        column(ITEMS, "text_emb", pa.nulls(60, pa.list_(pa.float32()))),
    ),
    Kind("vectors that are all zeros", TRAIN, "missing in every training item", column(ITEMS, "text_emb", [0.0] * 6)),
    Kind("a source that is not there", TRAIN + " --source audio", "no source 'audio'"),
    Kind("a source that is a category", TRAIN + " --source category", "category"),
    Kind("a target that is not there", TRAIN + " --target genre", "genre"),
    Kind("a target that is a source", TRAIN + " --target text_emb", "text_emb"),
    Kind(
        "categories that are not UTF-8",
        TRAIN + " --target bad",
        "bad",
        column(ITEMS, "bad", pa.array([b"\xff", b"a"]).view(pa.string())),
    ),
    Kind(
        "categories that are all null",
        TRAIN + " --target none",
        "none",
        column(ITEMS, "none", pa.nulls(60, pa.string())),
    ),
    Kind("categories that nest", TRAIN + " --target deep", "deep", column(ITEMS, "deep", [[["a"]]])),
    Kind("a log too short to test on", PREPARE, "targets", few),
    Kind(
        "every user too short for the policy",
        PREPARE + " --min-events 1000",
        "users of fewer than 1000 events are left out",
    ),
    Kind(
        "items that are all dropped as unknown",
        PREPARE + " --unknown-items drop",
        "events of unknown items are left out",
        column(EVENTS, "item_id", 10**9),
    ),
    Kind("weights below 0", VALIDATE + " --event-weight w", "a weight is 0 or more", column(EVENTS, "w", -1.0)),
    Kind(
        "weights that are NaN",
        VALIDATE + " --event-weight w",
        "a weight is 0 or more",
        column(EVENTS, "w", float("nan")),
    ),
    Kind("weights of text", VALIDATE + " --event-weight w", "weights are numbers", column(EVENTS, "w", "1")),
    Kind("weights without a column", VALIDATE + " --event-weight w", "w"),
    Kind("a feature without a column", PREPARE + " --event-features device", "device"),
    Kind("a feature that is the label", PREPARE + " --event-features label", "is a label to predict"),
    Kind("a feature of lists of lists", PREPARE + " --event-features deep", "deep", column(EVENTS, "deep", [[1]])),
    Kind("a feature of an unknown kind", PREPARE + " --event-features a:thing", "thing"),
    Kind("a feature twice", PREPARE + " --event-features a --history-features a", "'a' is twice among"),
    Kind("a user column without a column", PREPARE + " --user-columns age", "age"),
]
