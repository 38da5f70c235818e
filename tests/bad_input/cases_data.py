"""Data folders: files, columns, types and values."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.kinds import Folder, Kind

ITEMS, EVENTS, USERS = "data/items.parquet", "data/events.parquet", "data/users.parquet"
VALIDATE = "data validate --data {}/data"
PREPARE = "prepare --data {}/data --out {}/out"
TRAIN = "train-tokenizer --data {}/data --out {}/out --epochs 1"

Spoil = Callable[[Folder], object]


def written(file: str, content: bytes) -> Spoil:
    return lambda folder: (folder / file).write_bytes(content)


def cut(file: str, share: float) -> Spoil:
    def spoil(folder: Folder) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(len(content) * share)])

    return spoil


def zeros(file: str, begin: float, end: float) -> Spoil:
    def spoil(folder: Folder) -> None:
        content = bytearray((folder / file).read_bytes())
        places = slice(int(begin * len(content)), int(end * len(content)))
        content[places] = bytes(len(content[places]))
        (folder / file).write_bytes(content)

    return spoil


def replaced(file: str, make: Callable[[Path], object]) -> Spoil:
    def spoil(folder: Folder) -> None:
        path = folder / file
        path.unlink()
        make(path)

    return spoil


def column(file: str, name: str, values: object, *, first_only: bool = False) -> Spoil:
    return lambda folder: folder.column(file, name, values, first_only=first_only)


def without(file: str, name: str) -> Spoil:
    return lambda folder: folder.table(file, lambda table: table.drop_columns([name]))


def rows(file: str, count: int) -> Spoil:
    return lambda folder: folder.table(file, lambda table: table.slice(0, count))


def twice(file: str, name: str) -> Spoil:
    return lambda folder: folder.table(file, lambda table: table.append_column(name, table.column(name)))


def doubled(file: str) -> Spoil:
    return lambda folder: folder.table(file, lambda table: pa.concat_tables([table, table.slice(0, 1)]))


def vector(value: float) -> Spoil:
    """In the first item's text."""

    def change(table: pa.Table) -> pa.Table:
        rows_ = table.column("text_emb").to_pylist()
        rows_[0] = [value, *[1.0] * (len(rows_[0] or [0.0] * 6) - 1)]
        place = table.schema.get_field_index("text_emb")
        return table.set_column(place, "text_emb", pa.array(rows_, pa.list_(pa.float64())))

    return lambda folder: folder.table(ITEMS, change)


def ragged(folder: Folder) -> None:
    def change(table: pa.Table) -> pa.Table:
        vectors = [[1.0] * (5 + (row == 3)) for row in range(len(table))]
        return table.set_column(table.schema.get_field_index("text_emb"), "text_emb", pa.array(vectors))

    folder.table(ITEMS, change)


def parts(folder: Folder) -> None:
    """Two part files whose columns differ in type."""
    table = pq.read_table(folder / EVENTS)
    (folder / EVENTS).unlink()
    (folder / "data/events").mkdir()
    pq.write_table(table, folder / "data/events/0.parquet")
    names = table.column("user_id").cast(pa.string())
    other = table.set_column(table.schema.get_field_index("user_id"), "user_id", names)
    pq.write_table(other, folder / "data/events/1.parquet")


def empty_parts(folder: Folder) -> None:
    (folder / EVENTS).unlink()
    (folder / "data/events").mkdir()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def as_csv(path: Path) -> None:
    path.write_text("user_id,item_id,timestamp,label\n1,2,3,0\n")


def big_endian(path: Path) -> None:
    np.save(path.with_suffix(".npy"), np.arange(3, dtype=">i8"))
    path.with_suffix(".npy").rename(path)


def encrypted(path: Path) -> None:
    """The magic of a file whose footer is encrypted."""
    path.write_bytes(b"PARE" + bytes(64) + (16).to_bytes(4, "little") + b"PARE")


def events_backwards(table: pa.Table) -> pa.Table:
    return table.take(pa.array(range(len(table) - 1, -1, -1)))


def few(folder: Folder) -> None:
    """A log of two events, one of each label."""
    folder.table(EVENTS, lambda table: table.slice(0, 2))
    folder.column(EVENTS, "label", pa.array([0, 1], pa.int8()))


def json_file(text: str) -> Spoil:
    return written("data/schema.json", text.encode())


def no_folder(folder: Folder) -> None:
    shutil.rmtree(folder / "data")


FILES = [
    Kind("no data folder", VALIDATE, "data: no such folder; give the folder", no_folder),
    Kind("no items file", VALIDATE, "items.parquet: no such file", lambda f: (f / ITEMS).unlink()),
    Kind("no events file", PREPARE, "events.parquet: no such file", lambda f: (f / EVENTS).unlink()),
    *(
        Kind(
            f"{what} {kind} file",
            VALIDATE,
            f"{kind}.parquet: not a Parquet file, or cut short",
            spoil(f"data/{kind}.parquet"),
        )
        for kind in ("items", "events", "users")
        for what, spoil in {
            "an empty": lambda file: written(file, b""),
            "half of an": lambda file: cut(file, 0.5),
        }.items()
    ),
    Kind("a Parquet footer of zeros", VALIDATE, "not a Parquet file, or cut short", zeros(EVENTS, 0.9, 0.99)),
    Kind("a Parquet page of zeros", VALIDATE, "cannot be read past row 0", zeros(EVENTS, 0.1, 0.4)),
    Kind("a Parquet page of zeros, in prepare", PREPARE, "cannot be read past row 0", zeros(EVENTS, 0.1, 0.4)),
    Kind("CSV named .parquet", VALIDATE, "not a Parquet file, or cut short", replaced(EVENTS, as_csv)),
    Kind("a numpy file named .parquet", VALIDATE, "not a Parquet file, or cut short", replaced(ITEMS, big_endian)),
    Kind(
        "a Parquet file whose footer is encrypted",
        VALIDATE,
        "not a Parquet file, or cut short",
        replaced(EVENTS, encrypted),
    ),
    Kind(
        "text of another encoding named .parquet",
        VALIDATE,
        "not a Parquet file",
        written(EVENTS, "é\n".encode("utf-16")),
    ),
    Kind("a FIFO in place of a file", VALIDATE, "events.parquet", replaced(EVENTS, fifo)),
    Kind("a FIFO in place of the schema", VALIDATE, "schema.json", lambda f: os.mkfifo(f / "data/schema.json")),
    Kind("a symlink to itself", VALIDATE, "events.parquet", replaced(EVENTS, loop)),
    Kind("a symlink to nothing", VALIDATE, "events.parquet", replaced(EVENTS, lambda path: path.symlink_to("nowhere"))),
    Kind("a folder without parts", VALIDATE, "events: no file *.parquet in this folder", empty_parts),
    Kind("a folder where a file is named", "data validate --data {}/data/items.parquet", "no such folder"),
    Kind("parts of two types", VALIDATE, "write all parts with one type", parts),
    Kind("items without rows", VALIDATE, "items.parquet: the file has no rows", rows(ITEMS, 0)),
    Kind("events without rows", VALIDATE, "events.parquet: the file has no rows", rows(EVENTS, 0)),
    Kind("users without rows", VALIDATE, "users.parquet: the file has no rows", rows(USERS, 0)),
    Kind("a glob that finds nothing", VALIDATE + " --schema.events no*thing.parquet", "no file has a name like this"),
    Kind("a schema that names no file", VALIDATE + " --schema.items other.parquet", "other.parquet: no such file"),
    Kind("a schema of broken JSON", VALIDATE, "schema.json: not JSON, or cut short", json_file('{"items": ')),
    Kind("a schema that is a list", VALIDATE, "schema.json: no schema", json_file("[1]")),
    Kind("a schema that is a word", VALIDATE, "schema.json: no schema", json_file('"items"')),
    Kind("a schema with an unknown key", VALIDATE, "schema.json: no schema", json_file('{"item": "x"}')),
    Kind("a schema with a number for a name", VALIDATE, "schema.json: no schema: 'items'", json_file('{"items": 7}')),
    Kind(
        "a schema with numbers for columns",
        VALIDATE,
        "schema.json: no schema: 'columns'",
        json_file('{"columns": [1, 2]}'),
    ),
    Kind(
        "a schema with a text for a list",
        VALIDATE,
        "schema.json: no schema: 'columns'",
        json_file('{"columns": "item_id=sku"}'),
    ),
    Kind(
        "a schema with null for a list",
        VALIDATE,
        "schema.json: no schema: 'user_columns'",
        json_file('{"user_columns": null}'),
    ),
    Kind(
        "a schema with an unknown unit",
        VALIDATE,
        "schema.json: no schema: 'time_unit'",
        json_file('{"time_unit": "hours"}'),
    ),
    Kind(
        "a schema of bytes that are no text",
        VALIDATE,
        "schema.json: not JSON",
        written("data/schema.json", b"\xff\xfe\x00"),
    ),
    Kind("a schema that nests without end", VALIDATE, "schema.json: not JSON", json_file("[" * 100_000)),
    Kind("columns that are no pairs", VALIDATE + " --columns sku", "columns: 'sku' is no pair"),
    Kind("a column renamed twice", VALIDATE + " --columns item_id=a,item_id=b", "'item_id' is twice among ours"),
    Kind(
        "a renamed column that no file has", VALIDATE + " --columns item_id=nothing", "no file has a column 'nothing'"
    ),
]

COLUMNS = [
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
    Kind("an unknown unit of time", VALIDATE + " --time-unit h", "time_unit"),
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
CASES = [*FILES, *COLUMNS]
