"""A schema proposed for files whose columns are called otherwise than ours."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.columns import is_categorical, is_index, is_time, likely_unit
from sidrec_torchrec.data.folder import DataFolder, DataSchema, TimeUnit
from sidrec_torchrec.data.ids import id_type
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.data.vocabulary import UnfitColumn, Vocabulary
from sidrec_torchrec.errors import DataError

_CUSTOMARY = {
    "item_id": [
        "item",
        "itemid",
        "iid",
        "sku",
        "asin",
        "product_id",
        "productid",
        "article_id",
        "movie_id",
        "movieid",
        "video_id",
    ],
    "user_id": [
        "user",
        "userid",
        "uid",
        "customer_id",
        "customerid",
        "visitor_id",
        "visitorid",
        "member_id",
        "session_id",
    ],
    "timestamp": ["time", "ts", "event_time", "eventtime", "datetime", "date", "created_at", "unix_timestamp"],
}
_NEEDED = {"items": ("item_id",), "events": ("user_id", "item_id", "timestamp"), "users": ("user_id",)}


def propose(data: DataFolder) -> DataSchema:
    """What the files of a folder seem to be called, over what its schema says already.

    A column that is not there under our name is looked for under customary ones; times that are plain numbers get their
    likely unit; of users the columns that can be features are named.

    Raises:
        DataError: if a file is missing or broken, or a column that is needed is not found; lists those there are.
    """
    schema = data.schema
    tables = {kind: data.table(kind) for kind in _NEEDED if kind == "items" or data.has(kind)}
    for kind, table in tables.items():
        for column in _NEEDED[kind]:
            if column not in table.schema.names and column not in schema.names:
                fits = is_time if column == "timestamp" else lambda kind: id_type(kind) is not None
                schema = replace(schema, columns=(*schema.columns, f"{column}={_find(table, column, fits)}"))
    named = DataFolder(data.path, schema)
    if "events" in tables and not schema.time_unit:
        schema = replace(schema, time_unit=_unit(named.table("events")))
    if "users" in tables and not schema.user_columns:
        schema = replace(schema, user_columns=_features(named.table("users")))
    return schema


def _find(table: ParquetTable, column: str, fits: Callable[[pa.DataType], bool]) -> str:
    names = {field.name.lower().replace("-", "_"): field.name for field in table.schema if fits(field.type)}
    found = [names[name] for name in _CUSTOMARY[column] if name in names]
    if len(found) == 1:
        return found[0]
    which = f"{' and '.join(map(repr, found))} could be it" if found else "none has a customary name"
    raise DataError(
        f"{table.path}: no column '{column}', and {which}; say which it is: --columns {column}=ITS_NAME. There are "
        + ", ".join(f"'{field.name}' ({field.type})" for field in table.schema)
    )


def _unit(table: ParquetTable) -> TimeUnit:
    """Of times that are plain numbers; empty for seconds, and where Arrow knows."""
    kind = table.type_of("timestamp", what="required column")
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return ""
    for _, batch in table.batches(["timestamp"], 1 << 16):
        values_N = batch.column(0).drop_null().to_numpy(zero_copy_only=False)
        if len(values_N):
            unit = likely_unit(float(np.max(values_N)))
            return "" if unit == "s" else cast(TimeUnit, unit)
    return ""


@dataclass(frozen=True)
class _Scanned:
    table: ParquetTable


def _features(table: ParquetTable) -> tuple[str, ...]:
    """Users' columns that can be features."""
    able = [
        field.name
        for field in table.schema
        if field.name != "user_id" and is_categorical(field.type) and not is_index(field.name)
    ]
    return tuple(name for name in able if _is_category(table, name))


def _is_category(table: ParquetTable, name: str) -> bool:
    try:
        return 2 * len(Vocabulary.scan(_Scanned(table), name)) <= table.num_rows  # else it tells users apart: an id
    except UnfitColumn:
        return False
