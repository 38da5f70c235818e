"""Delimited text files of any length, a batch at a time, with errors that name file, column and line."""

import csv
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from sidrec_torchrec.errors import DataError, first_line

_BLOCK_BYTES = 1 << 23
_COLUMN = re.compile(r"In CSV column #(\d+)")


def csv_batches(
    path: Path, types: Mapping[str, pa.DataType], *, required: Collection[str] = (), names: Sequence[str] | None = None
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (number of the line that the batch begins with, from 1; batch of the columns of ``types``).

    Args:
        path: the file: commas, quotes and a first line of names; or tabs and no quotes, if ``names`` are given.
        types: of the columns to read; an empty field is null.
        required: columns in which none may be empty.
        names: of all columns of a file without a first line.

    Raises:
        DataError: if the file is missing, a column is, a line has another number of fields, or a value is of another
            type.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    header = _header(path) if names is None else list(names)
    for name in types:
        if name not in header:
            raise DataError(f"{path}: no column '{name}'; the file has {', '.join(header)}")
    line = 2 if names is None else 1
    try:
        with pa.csv.open_csv(
            path,
            # row numbers in errors need a single thread
            read_options=pa.csv.ReadOptions(column_names=names, use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=pa.csv.ParseOptions(
                delimiter="," if names is None else "\t", quote_char='"' if names is None else False
            ),
            convert_options=pa.csv.ConvertOptions(
                include_columns=list(types),
                column_types=types,
                strings_can_be_null=True,
                null_values=["", "nan", "NaN"],
            ),
        ) as batches:
            for batch in batches:
                for name in required:
                    _check_no_null(path, name, batch.column(name), line)
                yield line, batch
                line += batch.num_rows
    except pa.ArrowException as error:
        message = first_line(error)
        column = _COLUMN.search(message)
        where = f": column '{header[int(column[1])]}'" if column else ""
        raise DataError(f"{path}{where}: {message}; expected columns {', '.join(header)}") from error


def _header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        try:
            return next(csv.reader(file), [])
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8: {error}") from None


def _check_no_null(path: Path, name: str, column: pa.Array, line: int) -> None:
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(f"{path}: line {line + row}: column '{name}' is empty; every line needs a value")
