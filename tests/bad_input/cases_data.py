"""Files of a data folder."""

import os

from tests.bad_input.kinds import Kind
from tests.bad_input.spoils import (
    EVENTS,
    ITEMS,
    PREPARE,
    USERS,
    VALIDATE,
    as_csv,
    big_endian,
    cut,
    empty_parts,
    encrypted,
    fifo,
    json_file,
    loop,
    no_folder,
    parts,
    replaced,
    rows,
    written,
    zeros,
)

CASES = [
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
