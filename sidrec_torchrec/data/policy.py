"""What becomes of events that a log should not have: refused, mended or left out, and counted in either case."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.items import ItemRows
from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError, check_at_least

NO_ITEM = -1
"""The row of an event whose item the item file does not have: it stays in the history, and is never a target."""


@dataclass(frozen=True, kw_only=True)
class EventPolicy:
    """What to do about events that cannot be read as they are.

    Args:
        unknown_items: of events on items that the item file does not have: ``refuse`` the log, ``drop`` them, or ``keep``
            each in the history as an event without an item, which is never a target.
        sort: whether to sort each user's events by time, ties as they come; else a log that goes backwards is refused.
        drop_duplicates: whether to leave out all but the first of a user's events that are equal in item, time and labels.
        min_events: users with fewer events than this are left out.
    """

    unknown_items: Literal["refuse", "drop", "keep"] = "refuse"
    sort: bool = False
    drop_duplicates: bool = False
    min_events: int = 1

    def __post_init__(self) -> None:
        check_at_least(self, 1, "min_events")


@dataclass
class EventCounts:
    """What a policy met.

    Args:
        unknown_items: events on items that the item file does not have.
        unsorted: events that are earlier than the one before them of their user.
        duplicates: events that are equal to an earlier one of their user.
        short_users: users with fewer events than ``min_events``.
    """

    unknown_items: int = 0
    unsorted: int = 0
    duplicates: int = 0
    short_users: int = 0

    def add(self, other: "EventCounts") -> None:
        """Takes what was met elsewhere."""
        for name, count in vars(other).items():
            setattr(self, name, getattr(self, name) + count)

    def to_json(self, policy: EventPolicy) -> dict[str, Any]:
        """Each count, and what was done about it."""
        done = {"unknown_items": policy.unknown_items, "unsorted": "sort" if policy.sort else "refuse"}
        done |= {"duplicates": "drop" if policy.drop_duplicates else "keep", "short_users": "drop"}
        return {name: {"count": count, "policy": done[name]} for name, count in vars(self).items()}

    def why_so_few(self, policy: EventPolicy) -> str:
        """Why a log may leave nothing to train or test on, and how many events and users were left out of it."""
        left = {"events of unknown items": self.unknown_items if policy.unknown_items == "drop" else 0}
        left |= {"repeated events": self.duplicates if policy.drop_duplicates else 0}
        left |= {f"users of fewer than {policy.min_events} events": self.short_users}
        said = ", ".join(f"{count} {what}" for what, count in left.items() if count)
        return "the users have too few events for this protocol" + f" ({said} are left out)" * bool(said)


def goes_back(where: str, user: str, before: int, after: int) -> DataError:
    """A log that is not in order.

    Args:
        where: file and column, and the row if it is known.
        user: the user's id.
        before: a time of theirs.
        after: the next one's.
    """
    return DataError(
        f"{where}: time of user_id {user} goes back from {before} to {after}; sort the events of each user, or let it be done: --sort"
    )


REMEDY = "add the item, or say what to do with such events: --unknown-items drop, or keep"


def item_rows(
    rows: ItemRows, item_ids: pa.Array, table: ParquetTable, first_row: int, policy: EventPolicy, counts: EventCounts
) -> np.ndarray:
    """int32 [N], rows of the item file; ``NO_ITEM`` where it does not have the item.

    Raises:
        DataError: on such an item, if they are to be refused; names the row.
    """
    item_N = rows.find(item_ids, table, first_row)
    num_unknown = int((item_N < 0).sum())
    if num_unknown and policy.unknown_items == "refuse":
        raise rows.unknown(item_ids, item_N, table, first_row, REMEDY)
    counts.unknown_items += num_unknown
    return item_N


def repeats(*columns: np.ndarray) -> np.ndarray:
    """Whether an event is equal to an earlier one in all columns; bool [N]."""
    order = np.lexsort(columns)
    is_same = np.ones(max(len(order) - 1, 0), bool)
    for column_N in columns:
        is_same &= column_N[order[1:]] == column_N[order[:-1]]
    is_repeat_N = np.zeros(len(order), bool)
    is_repeat_N[order[1:][is_same]] = True  # lexsort is stable: of equal events the first in the log comes first
    return is_repeat_N
