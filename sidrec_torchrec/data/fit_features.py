"""Features as training has them, of events and of items; and items' codes as an array that the loader joins events with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sidrec_torchrec.data.buckets import EventBuckets
from sidrec_torchrec.data.census import Census
from sidrec_torchrec.data.events import Events, Users
from sidrec_torchrec.data.features import Draft, Feature, FeatureFit, FeatureName, Features, encode, numbers
from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.item_arrays import write_rows
from sidrec_torchrec.data.items import Items, open_items
from sidrec_torchrec.data.protocol import Splitter
from sidrec_torchrec.data.vocabulary import scan_vocabularies
from sidrec_torchrec.engines.base import Engine
from sidrec_torchrec.errors import DataError

_BATCH = 1 << 16


def fit_features(
    data: DataFolder,
    events: Events,
    items: Items,
    buckets: EventBuckets,
    splitter: Splitter,
    census: Census,
    drafts: Sequence[Draft],
    engine: Engine,
) -> Features:
    """The features that the schema names, of the events that training reads and of the items it has.

    Args:
        data: the data folder.
        events: its log.
        items: its items.
        buckets: the log by user.
        splitter: says what training reads.
        census: says which items training has.
        drafts: of the log's features.
        engine: that reads the log.

    Raises:
        DataError: if a column is missing, cannot be a feature, or has no value in training; names file and column.
    """
    of_log = _fit_events(events, buckets, splitter, drafts, engine) if drafts else ()
    known = events.num_known
    return Features(event=of_log[:known], item=_fit_items(data, items, census.seen_I), history=of_log[known:])


def fit_users(users: Users | None) -> tuple[Feature, ...]:
    """Of the user columns that were named, or of all categories of one value, but for those of too many values. Lists come last.

    Raises:
        DataError: if a column that was named has too many values for a category, or none; names file and column.
    """
    if users is None:
        return ()
    vocabularies = scan_vocabularies(users, users.categorical, skip_large=not users.are_chosen).items()
    single = tuple(Feature(name, found.values) for name, found in vocabularies if not found.multi_label)
    lists = tuple(Feature(name, found.values, is_list=True) for name, found in vocabularies if found.multi_label)
    if not users.dense:
        return (*single, *lists)
    fit = FeatureFit([Draft(named, None) for named in users.dense], users.num_users)
    for batch in users.batches(columns=[named.column for named in users.dense]):
        fit.add(np.stack([numbers(column) for column in batch.columns.values()], axis=1))
    return (*single, *_made(fit, users.path), *lists)


def choose_users(users: Users, features: Sequence[Feature]) -> Users:
    """The users with the columns of these features alone."""
    dense = tuple(FeatureName(feature.name, "dense") for feature in features if feature.bounds is not None)
    categorical = tuple(feature.name for feature in features if feature.bounds is None)
    return replace(users, categorical=categorical, dense=dense, are_chosen=True)


def _fit_events(
    events: Events, buckets: EventBuckets, splitter: Splitter, drafts: Sequence[Draft], engine: Engine
) -> tuple[Feature, ...]:
    fit = FeatureFit(drafts, events.num_events)
    for its in engine.map(_Bucket(buckets, splitter, tuple(drafts), events.num_events), range(buckets.count)):
        fit.merge(its)
    return _made(fit, buckets.path)


@dataclass(frozen=True)
class _Bucket:
    """What training has of the features in a bucket."""

    buckets: EventBuckets
    splitter: Splitter
    drafts: tuple[Draft, ...]
    num_events: int

    def __call__(self, bucket: int) -> FeatureFit:
        fit = FeatureFit(self.drafts, self.num_events, seed=bucket)
        for user in self.buckets.users(bucket):
            for split, places, _ in self.splitter.split(user):
                if split == "train":
                    fit.add(user.features[places])
        return fit


def _fit_items(data: DataFolder, items: Items, seen_I: np.ndarray) -> tuple[Feature, ...]:
    names = [FeatureName.parse(text) for text in data.schema.item_features]
    drafts = [Draft.of(items, named) for named in names]
    if not drafts:
        return ()
    fit = FeatureFit(drafts, int(seen_I.sum()))
    for first_row, batch in items.table.batches([named.column for named in names], _BATCH):
        raw = [draft.raw(batch.column(draft.named.column)) for draft in drafts]
        fit.add(np.stack(raw, axis=1)[seen_I[first_row : first_row + len(batch)]])
    return _made(fit, items.path)


def _made(fit: FeatureFit, path: Path) -> tuple[Feature, ...]:
    try:
        return fit.features()
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def write_item_codes(data: DataFolder, features: Sequence[Feature], path: Path) -> None:
    """Lays out codes of ``data``'s items as ``.npy``, int16 [num_items, F].

    Raises:
        DataError: if a column is missing or holds something else than it did in training; names file and column.
    """
    table = open_items(data, sources=(), targets=()).table
    for feature in features:
        table.type_of(feature.name, what="item feature")
    batches = (
        encode(features, dict(zip(batch.schema.names, batch.columns, strict=True)), len(batch), table)
        for _, batch in table.batches([feature.name for feature in features], _BATCH)
    )
    write_rows(path, (table.num_rows, len(features)), np.int16, batches)
