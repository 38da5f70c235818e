"""Ways to spoil a data folder."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.bad_input.kinds import Folder

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
