"""Which columns of a data folder nobody reads, and why not."""

from collections.abc import Callable, Iterable

import pyarrow as pa

from sidrec_torchrec.data.columns import is_categorical, is_index, is_label, is_list, may_be_vector
from sidrec_torchrec.data.events import EVENT_IDS, Events, Users
from sidrec_torchrec.data.items import Items
from sidrec_torchrec.data.parquet import ParquetTable

Unread = dict[str, str]
"""By column, as the files call it: its type, and the reason."""


def unread_items(items: Items, read: Iterable[str] | None = None) -> Unread:
    """Of the items' columns those that are not among ``read``; None for all sources and targets of ``items``."""
    read = (*items.source_dims, *items.categorical) if read is None else read
    return _unread(items.table, ("item_id", *read), _item_reason)


def unread_events(events: Events) -> Unread:
    """Of the events' columns those that are no id, time, label or feature."""
    features, values = ([named.column for named in own] for own in (events.features, events.regressions))
    return _unread(events.table, (*EVENT_IDS, *events.tasks, *features, *values, events.weight), _event_reason)


def unread_users(users: Users, features: Iterable[str]) -> Unread:
    """Of the users' columns those that are no feature."""
    chosen = "not among --user-columns" if users.are_chosen else ""
    return _unread(users.table, ("user_id", *features), lambda kind: chosen or _user_reason(kind))


def in_words(unread: Unread) -> str:
    """The columns in one line; empty without any."""
    return "not read: " * bool(unread) + "; ".join(f"'{column}' ({why})" for column, why in unread.items())


def _unread(table: ParquetTable, read: tuple[str, ...], reason: Callable[[pa.DataType], str]) -> Unread:
    return {
        table.own_name(field.name): f"{field.type}: {'a pandas index' if is_index(field.name) else reason(field.type)}"
        for field in table.schema
        if field.name not in read
    }


def _item_reason(kind: pa.DataType) -> str:
    if is_categorical(kind):
        return "not named as a target" if not may_be_vector(kind) else "named neither as a target nor as a source"
    if may_be_vector(kind):
        return "not named as a source"
    return "neither a source (a list of numbers) nor a target (a category)"


def _event_reason(kind: pa.DataType) -> str:
    return "not named as a task" if is_label(kind) else "neither an id, a time nor a label"


def _user_reason(kind: pa.DataType) -> str:
    if is_categorical(kind):
        return (
            "several values a row: read if it is among --user-columns"
            if is_list(kind)
            else "no value at all, or too many for a category"
        )
    return "not a category"
