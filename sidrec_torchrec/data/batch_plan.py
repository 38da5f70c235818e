"""Which rows make a batch: planned from the index alone, the same on every process, whatever their number.

Row groups are pooled, 64 or more, and a process reads every W-th group of a pool. Rows of the pool are put in rounds: in each
every group plays its next longer row, the groups in the order of their hands. So rows in succession are of like length, and
of one process after another.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from sidrec_torchrec.data.sequence_files import HANDS, RowGroup, SequenceFiles

_POOL_ROWS, _POOL_EVENTS = 1 << 12, 1 << 22
_JITTER = 16  # events by which rows of about the same length change places from epoch to epoch


@dataclass(frozen=True)
class Pool:
    """Row groups whose rows are batched together; G of them, of R rows in all.

    Args:
        groups: their numbers in the split, in order of their hands.
        looks: what the index says of them.
    """

    groups: list[int]
    looks: list[RowGroup]

    def own(self, rank: int, world_size: int) -> range:
        """Places of the groups that a process reads."""
        return range(rank, len(self.groups), world_size)

    def batches(self, batch_events: int, rng: np.random.Generator | None) -> list["PlannedBatch"]:
        """Every row of the pool once.

        Args:
            batch_events: events in a batch, padding included; a row that has more is a batch of its own.
            rng: to shuffle with; None to leave rows in order of their lengths.
        """
        sizes_G = [len(look.events_R) for look in self.looks]
        place_R = np.repeat(np.arange(len(sizes_G)), sizes_G)
        row_R = np.concatenate([np.arange(size) for size in sizes_G])
        events_R = np.concatenate([look.events_R for look in self.looks])
        jitter_R = rng.uniform(0, _JITTER, len(events_R)) if rng is not None else np.zeros(len(events_R))
        by_group = np.lexsort((events_R + jitter_R, place_R))  # in each group from short to long
        round_R = np.floor((row_R + 0.5) / np.repeat(sizes_G, sizes_G) * max(sizes_G))
        order = by_group[np.argsort(round_R, kind="stable")]  # by_group leaves places in order
        cuts = cut_by_length(events_R, batch_events, order)
        if rng is not None:
            rng.shuffle(cuts)
        targets_R = np.concatenate([look.targets_R for look in self.looks])
        labels_RK = np.concatenate([look.labels_RK for look in self.looks])
        return [PlannedBatch(place_R[b], row_R[b], int(targets_R[b].sum()), labels_RK[b].sum(axis=0)) for b in cuts]


@dataclass(frozen=True)
class PlannedBatch:
    """The B rows of a batch over all processes.

    Args:
        place_B: which group of the pool a row is in.
        row_B: which row of that group it is.
        targets: its targets that have an item.
        labels_K: float64, what those of them weigh together that have a label, by task.
    """

    place_B: np.ndarray
    row_B: np.ndarray
    targets: int
    labels_K: np.ndarray


def pools(files: SequenceFiles, rng: np.random.Generator | None) -> Iterator[Pool]:
    """All groups of a split, pooled.

    Args:
        files: the split.
        rng: to shuffle the groups with; None to leave them in order.
    """
    order = np.arange(files.num_groups)
    if rng is not None:
        rng.shuffle(order)
    groups: list[int] = []
    looks: list[RowGroup] = []
    rows = events = 0
    for group in order.tolist():
        groups.append(group)
        looks.append(files.look(group))
        rows += len(looks[-1].events_R)
        events += int(looks[-1].events_R.sum())
        if len(groups) >= HANDS and (rows >= _POOL_ROWS or events >= _POOL_EVENTS):
            yield _pool(groups, looks)
            groups, looks, rows, events = [], [], 0, 0
    if groups:
        yield _pool(groups, looks)


def _pool(groups: list[int], looks: list[RowGroup]) -> Pool:
    order = sorted(range(len(groups)), key=lambda place: looks[place].hand)
    return Pool([groups[place] for place in order], [looks[place] for place in order])


def cut_by_length(lengths: np.ndarray, batch_events: int, order: np.ndarray | None = None) -> list[list[int]]:
    """Batches of rows of like length, so that padding to the longest wastes little.

    Args:
        lengths: events of each row, int [R].
        batch_events: events in a batch, padding included; a row that has more is a batch of its own.
        order: to take the rows in, int [R]; None for that of their lengths.

    Returns:
        Places of each batch's rows, every row once.
    """
    batches: list[list[int]] = [[]]
    longest = 0
    for i in (np.argsort(lengths, kind="stable") if order is None else order).tolist():
        longest = max(longest, int(lengths[i]))
        if batches[-1] and (len(batches[-1]) + 1) * longest > batch_events:
            batches.append([])
            longest = int(lengths[i])
        batches[-1].append(i)
    return [batch for batch in batches if batch]
