"""Frames of other libraries as Arrow tables: whatever speaks Arrow's PyCapsule protocol, and none of them a dependency."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from sidrec_torchrec.errors import DataError, SidrecError, first_line

_VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


def is_frame(value: Any) -> bool:
    """Whether ``read_frame`` takes it."""
    return hasattr(value, "__arrow_c_stream__") or _is_of("datasets", "Dataset", value)


def read_frame(frame: Any, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A frame as an Arrow table, its rows in their order; Arrow's own memory is not copied.

    Args:
        frame: with ``__arrow_c_stream__``: a pandas (2.2 or newer) or Polars DataFrame, a DuckDB relation, an Arrow table, batch or
            reader, and so on; or a Hugging Face ``Dataset``. An index of pandas is left out.
        name: what errors call it.
        columns: those to keep, if it has them; None for all.

    Raises:
        DataError: on a column that Arrow has no type for; names the row if values of pandas are of several types.
        SidrecError: if it is no frame.
    """
    if not is_frame(frame):
        raise SidrecError(
            f"{name}: must be a frame (pandas, Polars, DuckDB, an Arrow table or a Hugging Face Dataset), is "
            f"{type(frame).__name__}"
        )
    try:
        if _is_of("pandas", "DataFrame", frame):
            table = _of_pandas(frame, name, columns)
        elif _is_of("datasets", "Dataset", frame):
            table = frame.with_format("arrow")[:]
        else:
            table = pa.RecordBatchReader.from_stream(frame).read_all()
    except DataError:
        raise
    except Exception as error:  # whatever the frame's library raises as it runs a query, say
        raise DataError(f"{name}: cannot be read: {first_line(error)}") from error
    if repeated := next((own for own in table.schema.names if table.schema.names.count(own) > 1), None):
        raise DataError(f"{name}: has two columns '{repeated}'; rename one")
    chosen = table if columns is None else table.select([own for own in columns if own in table.schema.names])
    return pa.table([_without_views(column) for column in chosen.columns], names=chosen.schema.names)


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array], name: str) -> pa.Table:
    """The table with columns added.

    Raises:
        DataError: if it has one of that name already.
    """
    for own, column in columns.items():
        if own in table.schema.names:
            raise DataError(f"{name}: has a column '{own}' already, which is to be added; rename it")
        table = table.append_column(own, column)
    return table


def _of_pandas(frame: Any, name: str, columns: Sequence[str] | None) -> pa.Table:
    """Column by column, so that those not asked for may hold what they like."""
    chosen = list(frame.columns) if columns is None else [own for own in columns if own in frame.columns]
    if unnamed := [own for own in chosen if not isinstance(own, str)]:
        raise DataError(f"{name}: column {unnamed[0]!r} has no name of letters; rename it: frame.rename(columns=str)")
    arrays = []
    for place, own in zip(map(list(frame.columns).index, chosen), chosen, strict=True):
        try:
            arrays.append(pa.array(frame.iloc[:, place], from_pandas=True))
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            row = _odd_row(list(frame.iloc[:, place]))
            raise DataError(
                f"{name}: column '{own}', row {row}: {first_line(error)}; give all rows values of one type"
            ) from error
    return pa.table(arrays, names=chosen)


def _odd_row(values: list[Any]) -> int:
    """The first row whose value does not go with those before it."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            pa.array(values[:middle], from_pandas=True)
            low = middle
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            high = middle
    return low


def _is_of(module: str, kind: str, value: Any) -> bool:
    """Whether a value is of a class of a module, which is not imported for it."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, kind))


def _without_views(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column, with texts and lists in one piece, as every version of Arrow computes with them."""
    if not pa.types.is_dictionary(column.type):
        kind = _in_one_piece(column.type)
        return column if kind == column.type else column.cast(kind)
    kind = _in_one_piece(column.type.value_type)
    chunks = [pa.DictionaryArray.from_arrays(own.indices, own.dictionary.cast(kind)) for own in column.chunks]
    return pa.chunked_array(chunks, pa.dictionary(column.type.index_type, kind))


def _in_one_piece(kind: pa.DataType) -> pa.DataType:
    if kind in _VIEWS:
        return _VIEWS[kind]
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_in_one_piece(kind.value_type))
    return pa.list_(_in_one_piece(kind.value_type)) if pa.types.is_list(kind) else kind
