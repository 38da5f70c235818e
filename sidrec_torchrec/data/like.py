"""Preparing new data like earlier ones: what codes, columns and events mean is the trained ranker's, and stays.

Kept are the values of user features, whose codes are 1, 2, ...; what columns are called, and the unit of times; the tasks; how
negatives are sampled; how long rows and histories are; and the policy. A value that was not there then has code 0.
"""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from sidrec_torchrec.data.census import Census
from sidrec_torchrec.data.features import Feature
from sidrec_torchrec.data.format import DataFolder, Users
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.protocol import NEVER, TIME, PrepareConfig
from sidrec_torchrec.data.tasks import split_tasks
from sidrec_torchrec.data.user_lists import encode_users
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.training.runs import run_path

TRAINED_ON = "trained_on"
"""In a ranker's folder: of the sequences it was trained on all but the sequences, in the form of a prepared folder."""

Config = TypeVar("Config", PrepareConfig, EventPolicy)


def prepared_of(folder: Path) -> Path:
    """The prepared folder that ``folder`` is, or that the ranker in it was trained on."""
    folder = Path(folder)
    if (folder / TRAINED_ON).is_dir():
        return folder / TRAINED_ON
    return run_path(folder, "prepared") or folder


def like_folder(data: DataFolder, own: Prepared) -> DataFolder:
    """The data folder; where neither it nor a flag says it, columns are called as ``own``'s were."""
    return replace(data, schema=data.schema.over(own.schema.columns_alone))


def like_config(config: PrepareConfig, own: Prepared) -> PrepareConfig:
    """The protocol; what it leaves at its default, of what must stay, is as ``own`` has it.

    Raises:
        SidrecError: if it names other tasks.
    """
    tasks = own.named_tasks
    if config.tasks and split_tasks(config.tasks) != split_tasks(tasks):
        raise SidrecError(
            f"--tasks {','.join(config.tasks)}: {own.folder} is of {', '.join(tasks or own.tasks)}; leave --tasks out, or prepare without --like"
        )
    kept = {name: getattr(own, name) for name in ("max_history", "targets_per_row", "negatives")}
    said = {name: value for name, value in kept.items() if value is not None}
    return replace(_over(config, replace(PrepareConfig(), **said)), tasks=tasks, policy=like_policy(config.policy, own))


def like_policy(policy: EventPolicy, own: Prepared) -> EventPolicy:
    """The policy; what it leaves at its default is as ``own`` has it."""
    return _over(policy, own.policy)


def backtest_config(own: Prepared, test_from: str | None, policy: EventPolicy) -> PrepareConfig:
    """The protocol that tests what came after ``own``'s training, and trains nothing.

    Args:
        own: what the ranker was trained on.
        test_from: when the test begins; None for the second after the last training event.
        policy: said over ``own``'s.

    Raises:
        SidrecError: if ``own`` does not say when that was.
    """
    if test_from is None and own.last_training_event is None:
        raise SidrecError(
            f"{own.folder}: does not say when its last training event was; name the day the test begins: --test-from"
        )
    begin = str((own.last_training_event or 0) + 1) if test_from is None else test_from
    return like_config(PrepareConfig(split=TIME, test_from=begin, test_only=True, policy=policy), own)


def like_users(data: DataFolder, users: Users | None, own: Prepared) -> tuple[Feature, ...]:
    """``own``'s user features.

    Raises:
        DataError: if the users are missing, or a feature of them, or it is of another type.
    """
    values = own.vocabularies
    if values and users is None:
        raise DataError(f"{data.where('users')}: not found; {own.folder} has the user features {', '.join(values)}")
    features = tuple(Feature.of_codes(name, known) for name, known in values.items())
    for feature in features:
        assert users is not None
        kind = users.table.type_of(feature.name, what="user feature")
        try:
            encode_users([feature], {feature.name: pa.array([], kind)})
        except DataError as error:
            raise DataError(f"{users.path}: {error}; write it as {own.folder} had it") from None
    return features


def like_census(census: Census, row_I: np.ndarray, own: Prepared) -> Census:
    """What is in a log, for a test alone: what is seen, and how often it trained, is what ``own``'s training had.

    Args:
        census: of the log.
        row_I: see ``own_rows``.
        own: what the ranker was trained on.
    """
    first_I = carried(own.first_events(), row_I, NEVER)
    return Census(
        training_I=carried(own.training_events(), row_I, 0),
        test_I=census.test_I,
        seen_I=carried(own.seen(), row_I, False),
        first_event_I=np.minimum(census.first_event_I, first_I),
        last_training_event=own.last_training_event,
    )


def own_rows(own: Prepared, item_ids: pa.Array, where: Path) -> np.ndarray:
    """The row that each item has in the item file ``own`` was prepared from, int64 [num_items]; -1 for a new item.

    Args:
        own: what a ranker was trained on.
        item_ids: of the item file at hand, canonical [num_items].
        where: it is, for messages.

    Raises:
        DataError: if ids are numbers in one and text in the other.
    """
    own_ids = own.item_ids()
    try:
        return IdIndex(own_ids).find(item_ids)
    except TypeError:
        raise DataError(
            f"{where}: item_id is {item_ids.type}, in {own.folder} it is {own_ids.type}; write items with one type"
        ) from None


def carried(own_I: np.ndarray, row_I: np.ndarray, new: int | bool) -> np.ndarray:
    """An array by ``own``'s item rows, by those of another item file [num_items]; ``new`` for new items."""
    return np.where(row_I >= 0, own_I[row_I], new).astype(own_I.dtype)


def _over(config: Config, other: Config) -> Config:
    """The config; where a field is at its default, the other's."""
    fields = dataclasses.fields(config)
    said = {f.name: getattr(config, f.name) for f in fields if getattr(config, f.name) != f.default}
    return replace(other, **said)
