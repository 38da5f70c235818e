"""A fractal expansion of a log: the Kronecker product of its matrix with a reduced copy of itself, as a data folder.

Block (a, b) of the expansion is the log once more: user u of it is child (u, a) there, item i is child (i, b). Of its
events a share stays in proportion to the reduced matrix' entry (``fractal_matrix``), each drawn by itself, after users
and items have been shuffled among their likes, anew in every block. So each child user meets up to ``items_times``
blocks of items, in each of which he does as some user like his parent did; and degrees of users and items, and the
singular values, are products of the log's and of the reduced matrix', but for the randomization.

Source: Belletti et al. 2019 (arXiv 1901.08910), with its randomization: a rate of dropout and a shuffle per block. The
authors' code takes the entry by the largest for the share that stays; here a factor makes it as many events as are
asked for. Their code shuffles all rows and all columns; here they move among likes alone, so that what users do still
follows what items are. The paper has no times and no content: those are ours (``_Blocks``, and ``fractal_items``).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import track

from sidrec_torchrec.data.columns import is_index
from sidrec_torchrec.data.event_log import parquet_writer
from sidrec_torchrec.data.events import EVENT_IDS, Events, Users, open_events, open_users
from sidrec_torchrec.data.folder import EVENTS_FILE, ITEMS_FILE, USERS_FILE, DataConfig, DataFolder, DataSchema
from sidrec_torchrec.data.fractal_items import ChildIds, content_order, write_items
from sidrec_torchrec.data.fractal_matrix import Reduced, reduce_log, shuffled_among_likes
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.items import ItemRows, Items, open_items
from sidrec_torchrec.errors import DataError, check_at_least, check_share
from sidrec_torchrec.files import atomic_path, write_json

SUMMARY_FILE = "fractal.json"

_REMEDY = "add the item, or leave its events out"
_DAY = 86_400
_SITTING = 8  # consecutive events of a parent that stay together
_EVENTS_AT_ONCE = 200_000  # of the parent; the expansion depends on it
_QUANTILES = (10, 50, 90, 99, 100)


@dataclass(frozen=True, kw_only=True)
class FractalConfig(DataConfig):
    """What to expand.

    Args:
        data: the data folder to expand.
        schema: what its files and columns are called.
        out: where the expansion goes: a data folder, too.
        users_times: how many children each user has.
        items_times: how many children each item has.
        kept: share of the events that stay, over all blocks: the expansion has ``kept * users_times * items_times``
            times the log's events.
        user_likes: users are shuffled among so many of like taste; 1 leaves them in place.
        item_likes: items are shuffled among so many of like content; 1 leaves them in place.
        own_content: share of the variance of an item's content that is not its parent's; half of that is its block's.
        days: a child's sittings are spread over so many days after its parent's.
        seed: same log and same seed, same expansion.
    """

    out: Path
    users_times: int = 16
    items_times: int = 16
    kept: float = 0.4
    user_likes: int = 8
    item_likes: int = 4
    own_content: float = 0.25
    days: int = 180
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "users_times", "items_times", "user_likes", "item_likes")
        check_at_least(self, 0, "days", "seed")
        check_share(self, "own_content")
        if not 0.01 <= self.kept <= 0.95:
            raise ValueError(f"kept must lie in [0.01, 0.95], got {self.kept}")


@dataclass(frozen=True)
class _Parent:
    """The log, by user in order of likeness, each user's events by time; N events.

    Args:
        user_ids: canonical [U], of the log and of the user file.
        user_N, item_N: int64 [N], places of users and rows of items.
        time_N: int64 [N], seconds.
        others: table of N rows: labels, and whatever else the log has.
        num_items: in the item file.
    """

    user_ids: pa.Array
    user_N: np.ndarray
    item_N: np.ndarray
    time_N: np.ndarray
    others: pa.Table
    num_items: int


def write_fractal(config: FractalConfig, *, progress: bool = False) -> dict[str, Any]:
    """Writes ``items.parquet``, ``events.parquet``, ``fractal.json`` and, where the log has users, ``users.parquet``.

    Memory holds the log itself, its items' ids and other columns without vectors, and a few million events of the
    expansion.

    Args:
        config: what to expand, and how.
        progress: show a progress bar.

    Returns:
        What ``fractal.json`` says: counts; ``density`` of users times items; ``quantiles`` of events per user and per
        item that has any, of the parent and of the expansion; how ids of children are made.

    Raises:
        DataError: if the log is broken, has an event on an item it has not, or fewer users or items than children are
            asked for.
    """
    folder, out = config.folder, config.out
    if out.resolve() == config.data.resolve():
        raise DataError(f"{out}: is the folder to expand; name another for the expansion")
    items, events, users = open_items(folder, targets=()), open_events(folder), open_users(folder)
    reduced, parent = _read(config, items, events, users)
    likes_I = content_order(items) if items.source_dims else reduced.item_order_I
    blocks = _Blocks(config, parent, reduced, likes_I)
    item_ids = ChildIds.of(items.ids(), config.items_times)
    user_ids = ChildIds.of(parent.user_ids, config.users_times)
    counts = _write_events(out / EVENTS_FILE, config, blocks, user_ids, item_ids, progress)
    write_items(out / ITEMS_FILE, items, item_ids, config.own_content, config.seed)
    if users is not None:
        _write_users(out / USERS_FILE, users, parent.user_ids, user_ids)
    _write_schema(out, folder.schema)
    summary = _summary(parent, counts) | {"user_ids": user_ids.words, "item_ids": item_ids.words}
    write_json(out / SUMMARY_FILE, summary, sealed=True)
    return summary


def _read(config: FractalConfig, items: Items, events: Events, users: Users | None) -> tuple[Reduced, _Parent]:
    rows, index = ItemRows(items), IdIndex()
    user, item, time, value = [], [], [], []
    for batch in events.batches(to_learn=False):
        user.append(index.add(batch.user_ids))
        item.append(rows.find_all(batch.item_ids, events.table, batch.first_row, _REMEDY).astype(np.int64))
        time.append(batch.timestamps)
        value.append(np.where(batch.labels[:, 0] == 1, 1.0, -1.0) if events.tasks else np.ones(len(batch)))
    user_N, item_N, time_N, value_N = (np.concatenate(parts) for parts in (user, item, time, value))
    shape, times = (len(index), len(rows)), (config.users_times, config.items_times)
    for what, count, asked in (("users", shape[0], times[0]), ("items", shape[1], times[1])):
        if count < asked:
            raise DataError(
                f"{config.data}: {what}_times is {asked}, but the log has {count} {what}; expand it fewer times"
            )
    reduced = reduce_log(user_N, item_N, value_N, shape, times, config.kept, config.seed)
    place_U = np.empty(shape[0], np.int64)
    place_U[reduced.user_order_U] = np.arange(shape[0])
    order = np.lexsort((time_N, place_U[user_N]))
    if users is not None:
        index.add(users.ids())
    names = [f.name for f in events.table.schema if f.name not in EVENT_IDS and not is_index(f.name)]
    batches = [batch for _, batch in events.table.batches(names, 1 << 18)] if names else []
    others = pa.Table.from_batches(batches).take(pa.array(order)) if names else pa.table({})
    return reduced, _Parent(index.ids, user_N[order], item_N[order], time_N[order], others, len(rows))


@dataclass(frozen=True)
class _Part:
    """Some events of the expansion: of children ``row`` of users; each user's together, by time; M events."""

    row: int
    user_M: np.ndarray
    item_M: np.ndarray
    column_M: np.ndarray
    time_M: np.ndarray
    others: pa.Table


class _Blocks:
    """The expansion's events, a row of blocks and some users at a time.

    Of a parent's events each eight that follow one another are a sitting, which comes some days later in the child, no
    sitting before one that it follows: a block keeps its parent's order and time of day, and a child's blocks mix.
    """

    def __init__(self, config: FractalConfig, parent: _Parent, reduced: Reduced, likes_I: np.ndarray) -> None:
        self.parent = parent
        self._config = config
        self._reduced = reduced
        self._likes_I = likes_I
        order_U = reduced.user_order_U
        size_U = np.bincount(parent.user_N, minlength=len(order_U))[order_U]
        self._begin_U1 = np.r_[0, np.cumsum(size_U)]
        self._stretches = list(self._cut())

    def __len__(self) -> int:
        return self._config.users_times * len(self._stretches)

    def __iter__(self) -> Iterator[_Part]:
        config = self._config
        for row in range(config.users_times):
            rng = np.random.default_rng([config.seed, 0, row])
            items_BI = np.empty((config.items_times, self.parent.num_items), np.int64)
            for items_I in items_BI:
                items_I[self._likes_I] = shuffled_among_likes(self._likes_I, config.item_likes, rng)
            for number, (begin, end) in enumerate(self._stretches):
                yield self._part(row, begin, end, items_BI, np.random.default_rng([config.seed, 1, row, number]))

    def _cut(self) -> Iterator[tuple[int, int]]:
        """Stretches of users, whole groups of likes, of about as many events as memory is to hold."""
        num_users, begin = len(self._begin_U1) - 1, 0
        while begin < num_users:
            target = self._begin_U1[begin] + _EVENTS_AT_ONCE
            end = int(np.searchsorted(self._begin_U1, target, side="right")) - 1
            end = max(end // self._config.user_likes, begin // self._config.user_likes + 1) * self._config.user_likes
            yield begin, min(end, num_users)
            begin = end

    def _part(self, row: int, begin: int, end: int, items_BI: np.ndarray, rng: np.random.Generator) -> _Part:
        users_S = self._reduced.user_order_U[begin:end]
        first, last = self._begin_U1[begin], self._begin_U1[end]
        size_S = np.diff(self._begin_U1[begin : end + 1])
        user_E = np.repeat(np.arange(end - begin), size_S)
        # a sitting is numbered through all users: those of user s begin at sitting_S[s]
        count_S = -(-size_S // _SITTING)
        within_E = np.arange(last - first) - np.repeat(self._begin_U1[begin:end] - first, size_S)
        sitting_E = np.repeat(np.cumsum(count_S) - count_S, size_S) + within_E // _SITTING
        user_of_sitting = np.repeat(np.arange(end - begin), count_S)
        found = []
        for column, items_I in enumerate(items_BI):
            kept = np.flatnonzero(rng.random(last - first) < self._reduced.keep_AB[row, column])
            days = rng.integers(0, self._config.days, len(user_of_sitting), endpoint=True)
            days = days[np.lexsort((days, user_of_sitting))]
            becomes_S = shuffled_among_likes(users_S, self._config.user_likes, rng)
            time_M = self.parent.time_N[first + kept] + _DAY * days[sitting_E[kept]]
            item_M = items_I[self.parent.item_N[first + kept]]
            found.append((becomes_S[user_E[kept]], item_M, np.full(len(kept), column), time_M, first + kept))
        user_M, item_M, column_M, time_M, source_M = (np.concatenate(parts) for parts in zip(*found, strict=True))
        order = np.lexsort((time_M, user_M))
        others = self.parent.others.take(pa.array(source_M[order]))
        return _Part(row, user_M[order], item_M[order], column_M[order], time_M[order], others)


def _write_events(
    path: Path, config: FractalConfig, blocks: _Blocks, user_ids: ChildIds, item_ids: ChildIds, progress: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the events; returns how many each child user and item has."""
    parent = blocks.parent
    count_AU = np.zeros((config.users_times, len(parent.user_ids)), np.int64)
    count_BI = np.zeros((config.items_times, parent.num_items), np.int64)
    ids = {"user_id": user_ids.type, "item_id": item_ids.type, "timestamp": pa.int64()}
    schema = pa.schema([*ids.items(), *(field.remove_metadata() for field in parent.others.schema)])
    with atomic_path(path) as temporary, parquet_writer(temporary, schema) as writer:
        for part in track(blocks, "fractal events", total=len(blocks), disable=not progress):
            users = user_ids.take(part.user_M, np.full(len(part.user_M), part.row))
            columns = [users, item_ids.take(part.item_M, part.column_M), pa.array(part.time_M), *part.others.columns]
            if len(users):
                writer.write_table(pa.table(columns, schema=schema))
            count_AU[part.row] += np.bincount(part.user_M, minlength=count_AU.shape[1])
            np.add.at(count_BI, (part.column_M, part.item_M), 1)
        if not count_AU.any():
            raise DataError(f"{path}: not written: no event is left; raise kept")
    return count_AU.ravel(), count_BI.ravel()


def _write_users(path: Path, users: Users, known: pa.Array, children: ChildIds) -> None:
    """Each child has the columns of its parent."""
    place_U = IdIndex(known).find(users.ids())
    names = [field.name for field in users.table.schema if field.name != "user_id" and not is_index(field.name)]
    fields = [users.table.schema.field(name).remove_metadata() for name in names]
    schema = pa.schema([("user_id", children.type), *fields])
    with atomic_path(path) as temporary, parquet_writer(temporary, schema) as writer:
        for row in range(children.times):
            for first_row, batch in users.table.batches(["user_id", *names], 1 << 16):
                place_N = place_U[first_row : first_row + len(batch)]
                columns = [children.take(place_N, np.full(len(batch), row)), *(batch.column(name) for name in names)]
                writer.write_batch(pa.record_batch(columns, schema=schema))


def _write_schema(out: Path, schema: DataSchema) -> None:
    """What the log's schema says of features: all else is called as we call it now."""
    DataFolder(out, replace(schema.columns_alone, columns=(), time_unit="")).write_schema()


def _summary(parent: _Parent, counts: tuple[np.ndarray, np.ndarray]) -> dict[str, Any]:
    count_U, count_I = counts
    sizes = {
        "parent": (np.bincount(parent.user_N), np.bincount(parent.item_N, minlength=parent.num_items)),
        "expansion": (count_U, count_I),
    }
    summary: dict[str, Any] = {
        "users": int((count_U > 0).sum()),
        "items": len(count_I),
        "events": int(count_U.sum()),
        "density": float(count_U.sum() / ((count_U > 0).sum() * len(count_I))),
        "parent_density": float(len(parent.user_N) / ((sizes["parent"][0] > 0).sum() * parent.num_items)),
        "quantiles": {},
    }
    for whose, (of_users, of_items) in sizes.items():
        summary["quantiles"][whose] = {
            f"events per {what}": {f"p{q}": int(np.percentile(x[x > 0], q)) for q in _QUANTILES}
            for what, x in (("user", of_users), ("item", of_items))
        }
    return summary
