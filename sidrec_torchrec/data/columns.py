"""What a column of a data folder may hold: vectors, categories, times, labels; and how each is read."""

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.tasks import UNKNOWN

UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
"""Integer timestamps: how many of each unit are a second."""

_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_EARLIEST, _LATEST = 10**8, 10**11  # seconds: the years 1973 and 5138, between which logs are of today


def record_batch(columns: Iterable[np.ndarray | pa.Array], schema: pa.Schema) -> pa.RecordBatch:
    """Columns of numpy or Arrow, in the schema's order, as its types."""
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """What a column's values are, however Arrow keeps them: one type for all widths of integers, all kinds of lists, ..."""
    kind = storage_type(kind)
    if is_list(kind):
        return pa.list_(plain_type(kind.value_type))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_floating(kind):
        return pa.float64()
    if pa.types.is_timestamp(kind):
        return pa.timestamp("s")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def storage_type(kind: pa.DataType) -> pa.DataType:
    """The type without extensions (tensors, UUIDs, JSON) and dictionaries around it."""
    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind):
        kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind.value_type
    return kind


def is_list(kind: pa.DataType) -> bool:
    """Whether a row holds several values."""
    return (
        pa.types.is_list(kind)
        or pa.types.is_large_list(kind)
        or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind)
        or pa.types.is_large_list_view(kind)
    )


def is_tensor(kind: pa.DataType) -> bool:
    """Whether a row holds a tensor of one dimension."""
    return isinstance(kind, pa.FixedShapeTensorType) and len(kind.shape) == 1


def is_vector(kind: pa.DataType) -> bool:
    """Whether a column is a source unless somebody says otherwise: lists of floats, tensors, integers of one number a row."""
    if is_tensor(kind):
        return is_number(kind.value_type)
    if not is_list(kind):
        return False
    return pa.types.is_floating(kind.value_type) or (
        pa.types.is_fixed_size_list(kind) and kind.list_size > 1 and pa.types.is_integer(kind.value_type)
    )


def vector_lists(x_ND: np.ndarray, present_N: np.ndarray) -> pa.Array:
    """Vectors as a column of lists of their dtype, null where none is present.

    Of no fixed size, for pyarrow before 26 cannot read a null among lists of one.
    """
    offsets_N = np.concatenate([[0], np.cumsum(present_N * x_ND.shape[1])])
    values = pa.array(x_ND[present_N].reshape(-1))
    return pa.ListArray.from_arrays(pa.array(offsets_N, pa.int32()), values, mask=pa.array(~present_N))


def may_be_vector(kind: pa.DataType) -> bool:
    """Whether a column can be a source if it is named as one: lists of any numbers."""
    return is_tensor(kind) or (is_list(kind) and is_number(kind.value_type))


def is_categorical(kind: pa.DataType) -> bool:
    """Whether a column can be categorical: strings, integers or booleans, or lists of them."""
    if isinstance(kind, pa.BaseExtensionType):
        return False
    kind = plain_type(kind.value_type if is_list(kind) else kind)
    return kind == pa.string() or kind == pa.int64() or kind == pa.bool_()


def is_multi_label(kind: pa.DataType) -> bool:
    """Whether a categorical column of this type holds several values a row."""
    return is_list(kind)


def vectors(column: pa.Array, dim: int) -> tuple[np.ndarray, np.ndarray, int | None]:
    """A column of lists of numbers as a matrix; null, empty and all-zero rows are missing.

    Args:
        column: N lists of numbers, or tensors.
        dim: the width every row that is there must have.

    Returns:
        float32 [N, dim] with zeros where missing; bool [N], where a vector is there; and the first row of another
        width, None if there is none (then the other two are meaningless).
    """
    if isinstance(column.type, pa.BaseExtensionType):
        column = column.storage
    num_rows = len(column)
    lengths_N = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    given_N = lengths_N > 0
    wrong_N = given_N & (lengths_N != dim)
    if wrong_N.any():
        return np.empty((0, dim), np.float32), given_N, int(np.argmax(wrong_N))
    x_ND = np.zeros((num_rows, dim), np.float32)
    # flatten() skips null rows, whatever lies beneath them; nulls inside a vector become NaN and are refused as such.
    with np.errstate(over="ignore"):  # doubles beyond float32 become infinite, and are refused as such
        x_ND[given_N] = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim)
    return x_ND, np.any(x_ND, axis=1), None


def is_index(name: str) -> bool:
    """Whether a column is a pandas index without a name, which to_parquet writes beside the others."""
    return name.startswith("__index_level_") and name.endswith("__")


def is_time(kind: pa.DataType) -> bool:
    """Whether a column can hold timestamps: times, dates, or numbers."""
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or is_number(kind)


def seconds(column: pa.Array, unit: str) -> np.ndarray:
    """Timestamps as whole seconds since 1970 (UTC), int64 [N]; what Arrow knows the unit of needs no ``unit``.

    Args:
        column: without nulls.
        unit: of numbers; a key of ``UNITS``.

    Raises:
        ValueError: if numbers cannot be of this unit: lists the unit they are likely of.
    """
    kind = column.type
    if pa.types.is_date(kind):
        column, kind = column.cast(pa.timestamp("ms")), pa.timestamp("ms")
    if pa.types.is_timestamp(kind):
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False) // UNITS[kind.unit]
    values_N = column.to_numpy(zero_copy_only=False)
    if values_N.dtype.kind == "f" and not np.isfinite(values_N).all():
        raise ValueError("a time is not finite")
    if len(values_N):
        _check_unit(float(values_N.max()), unit)
    if values_N.dtype.kind == "f":
        return np.floor(values_N / UNITS[unit]).astype(np.int64)
    values_N = values_N.astype(np.int64, copy=False)
    return values_N if unit == "s" else values_N // UNITS[unit]


def likely_unit(latest: float) -> str:
    """The unit in which a log's last time is of our days; seconds if it is of none."""
    if latest < _EARLIEST:
        return "s"
    return next((name for name, per_second in UNITS.items() if latest / per_second < _LATEST), "ns")


def _check_unit(latest: float, unit: str) -> None:
    if unit == "s" and 19900101 <= latest <= 21001231 and 1 <= latest // 100 % 100 <= 12 and 1 <= latest % 100 <= 31:
        raise ValueError(f"{latest:.0f} looks like a date written as a number; make a date or timestamp column of it")
    likely = likely_unit(latest)
    is_late = latest / UNITS[unit] >= _LATEST
    is_early = latest / UNITS[unit] < _EARLIEST and UNITS[likely] < UNITS[unit]
    if is_late or is_early:
        raise ValueError(f"{latest:.0f} cannot be {_NAMES[unit]}, it looks like {_NAMES[likely]}: --time-unit {likely}")


def is_label(kind: pa.DataType) -> bool:
    """Whether a column can hold labels: integers, booleans or floats."""
    return is_number(kind) or pa.types.is_boolean(kind)


def labels(column: pa.Array) -> np.ndarray:
    """Labels, int8 [N]: 0 and 1 as they are, UNKNOWN where null or NaN, and -1 for what is no label."""
    values_N = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    labels_N = np.full(len(values_N), -1, np.int8)
    labels_N[values_N == 0] = 0
    labels_N[values_N == 1] = 1
    labels_N[np.isnan(values_N)] = UNKNOWN
    return labels_N


def is_number(kind: pa.DataType) -> bool:
    """Whether a column holds integers or floats."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)
