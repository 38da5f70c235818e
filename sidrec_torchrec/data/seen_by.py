"""Sequences as a ranker sees them that was trained on others: what is seen, and how often, is what its own training had."""

from dataclasses import dataclass, fields
from functools import cached_property
from itertools import zip_longest

import numpy as np

from sidrec_torchrec.data.features import Feature
from sidrec_torchrec.data.like import carried, own_rows
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.protocol import NEVER
from sidrec_torchrec.errors import SidrecError


@dataclass(frozen=True, kw_only=True)
class SeenBy(Prepared):
    """Sequences with the training of a ranker. Made by ``seen_by``.

    Args:
        own: what the ranker was trained on.
    """

    own: Prepared

    @cached_property
    def own_rows(self) -> np.ndarray:
        """The row that each item has in the ranker's own item file, int64 [num_items]; -1 for an item that is new to it.

        Raises:
            DataError: if ids are numbers in one and text in the other.
        """
        return own_rows(self.own, self.item_ids(), self.folder)

    def seen(self) -> np.ndarray:
        return carried(self.own.seen(), self.own_rows, False)

    def training_events(self) -> np.ndarray:
        return carried(self.own.training_events(), self.own_rows, 0)

    def first_events(self) -> np.ndarray:
        """The time of each item's first event in either log; see ``Prepared.first_events``."""
        own_I, first_I = self.own.first_events(), super().first_events()
        return np.minimum(carried(own_I, self.own_rows, NEVER), first_I)


def seen_by(own: Prepared, given: Prepared) -> SeenBy:
    """The sequences ``given`` as a ranker sees them that was trained on ``own``."""
    said = {field.name: getattr(given, field.name) for field in fields(Prepared)}
    kept = {"last_training_event": own.last_training_event, "regressions": own.regressions}  # the scale is the ranker's
    return SeenBy(**said | kept, own=own)


def check_alike(own: Prepared, given: Prepared, ranker: str) -> None:
    """Refuses sequences whose features or codes have another meaning than a ranker's own.

    Args:
        own: what the ranker was trained on.
        given: what it meets.
        ranker: its name, for the message.

    Raises:
        SidrecError: names the feature and the first difference.
    """
    difference = _difference(own, given)
    if difference is not None:
        whose = "users" if difference.startswith("user feature") else "events"
        raise SidrecError(
            f"{given.folder}: prepared with other codes of {whose} than {ranker} was trained on: {difference}; prepare the data again with "
            f"--like {ranker}"
        )


def check_labels(own: Prepared, given: Prepared) -> None:
    """Refuses sequences of other labels than a ranker predicts.

    Raises:
        SidrecError: names the tasks of both.
    """
    tasks, predicts = (p.named_tasks or p.tasks for p in (given, own))
    if tasks != predicts and (own.tasks != given.tasks or own.regressions or given.regressions):
        raise SidrecError(
            f"{given.folder}: of the tasks {', '.join(tasks)}; the ranker predicts {', '.join(predicts)}: "
            "prepare with the same --protocol.tasks"
        )
    if own.sampled_negatives != given.sampled_negatives:
        has, had = (" labels" if not p.sampled_negatives else " sampled negatives" for p in (given, own))
        raise SidrecError(f"{given.folder}: has{has}; the ranker was trained on{had}: prepare with --like")


def _difference(own: Prepared, given: Prepared) -> str | None:
    names, others = list(own.user_features), list(given.user_features)
    if names != others:
        missing = [name for name in names if name not in others]
        more = [name for name in others if name not in names]
        if missing or more:
            return f"user feature '{(missing or more)[0]}' is {'missing' if missing else 'new'}"
        return f"user features are in the order {', '.join(others)}, not {', '.join(names)}"
    for name in names:
        values, there = own.vocabularies[name], given.vocabularies[name]
        if difference := _other_codes(*(Feature.of_codes(name, kept) for kept in (values, there))):
            return f"user feature {difference}"
    if list(own.features.sizes) != list(given.features.sizes):
        names_of = (", ".join(p.features.sizes) or "none" for p in (given, own))
        return "its features are {}, those of the ranker {}".format(*names_of)
    if len(own.features.known) != len(given.features.known):
        return "other features are known of a target"
    pairs = zip(own.features.all, given.features.all, strict=True)
    return next((f"feature {found}" for ours, theirs in pairs if (found := _other_codes(ours, theirs))), None)


def _other_codes(own: Feature, given: Feature) -> str | None:
    """The first code that means something else."""
    if own.is_list != given.is_list:
        holds, held = ("lists" if feature.is_list else "one value a row" for feature in (given, own))
        return f"'{own.name}' holds {holds} there and {held} to the ranker"
    kinds = [[*map(repr, f.values)] if f.bounds is None else [f"from {b}" for b in f.bounds] for f in (own, given)]
    first = 1 if own.bounds is None else 2
    for place, (had, has) in enumerate(zip_longest(*kinds, fillvalue="nothing")):
        if had != has:
            return f"'{own.name}', code {place + first}, is {has} there and {had} to the ranker"
    return None
