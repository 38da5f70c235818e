"""A trained ranker's predictions of requests: for a batch job, or from a table in a notebook."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from torch import nn

from sidrec_torchrec.data.batch_plan import cut_by_length
from sidrec_torchrec.data.batches import Collator
from sidrec_torchrec.data.events import (
    EVENT_IDS,
    Events,
    Users,
    events_of,
    open_events,
    open_users,
    users_of,
)
from sidrec_torchrec.data.format import DataFolder, DataSchema, open_items
from sidrec_torchrec.data.frames import read_frame, with_columns
from sidrec_torchrec.data.histories import Histories, UserCodes
from sidrec_torchrec.data.items import ItemRows, Items
from sidrec_torchrec.data.parquet import ArrowTable
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.requests import GivenRequests, Known, NewestEvents, RequestBatch, Requests, newest_schema
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.processes import sum_over_processes
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.storage.mirror import local
from sidrec_torchrec.training.group import Processes, current_processes, process_group

_TARGETS_PER_ROW = 256  # requests of one history that are scored together


@dataclass(frozen=True)
class Scored:
    """R requests with what is predicted of them.

    Args:
        columns: of the requests.
        is_without_history: bool [R].
        probability_RK: float32; see ``Predictor.names``.
    """

    columns: pa.RecordBatch
    is_without_history: np.ndarray
    probability_RK: np.ndarray


@dataclass(frozen=True)
class Predictor:
    """Scores requests by a trained ranker. Made by ``Predictor.open``.

    Memory holds the model, a batch, 20 bytes an item, ``Histories`` (21 bytes an event) and ``UserCodes`` (8 bytes a
    user, and 4 a user feature), whatever the number of requests.

    Args:
        trained: the ranker.
        prepared: sequences whose items requests are about.
        model: the ranker's best epoch; whole, or sharded over the processes.
        collate: makes its batches.
        items: the item file.
        rows: of its items.
        log: events that histories come from by default.
        users: features of users, by default.
        values: by user feature, what its codes stand for; see ``Prepared.vocabularies``.
        max_history: most events of a history, the last ones.
        batch_events: events in a batch over all processes, padding included.
        processes: the group.
        opened: what ``open`` was given.

    Pickled, it is what ``open`` was given, and is opened where it arrives, alone.

    Example::

        from sidrec_torchrec import Predictor

        probabilities = Predictor.open("runs/side").predict(frame)  # of user_id, item_id and timestamp
    """

    trained: TrainedRanker
    prepared: Prepared
    model: nn.Module
    collate: Collator
    items: Items
    rows: ItemRows
    log: Events
    users: UserCodes
    values: dict[str, Any]
    max_history: int
    batch_events: int
    processes: Processes
    opened: dict[str, Any]

    @staticmethod
    def open(
        ranker: str | Path,
        *,
        events: Any = None,
        users: Any = None,
        prepared: str | Path | None = None,
        data: str | Path | None = None,
        sids: Sequence[str | Path] = (),
        max_history: int | None = None,
        batch_events: int = 8192,
        read: bool = True,
    ) -> "Predictor":
        """Opens the best epoch of a ranker and reads the events; on every process of a group, if there is one.

        Args:
            ranker: folder train-ranker wrote.
            events: where histories come from: a file like ``events.parquet``, a data folder, or a frame (see ``predict``); None
                for the data folder that the ranker was trained on.
            users: likewise, like ``users.parquet``; None for that of ``events``, if it is a folder, else as above.
            prepared: sequences prepared anew, if the item file has more items by now; the ranker stays as it is.
            data: data folder of those sequences, if it is not the ranker's own.
            sids: folders of its items' SIDs, by the codecs that the ranker reads; none given: its own folders.
            max_history: most events of a history, the last ones; None for as many as the ranker's sequences carry.
            batch_events: events in a batch over all processes, padding included.
            read: whether to read the events at once; else when they are first needed.

        Raises:
            SidrecError: on a folder without a trained ranker.
            CodecMismatchError: if the SIDs it reads have been encoded anew, by another codec.
            DataError: on bad events or users; names file, column and row.
        """
        opened = {name: value for name, value in locals().items() if name != "read"}
        shared = dist.is_initialized() and dist.get_world_size() > 1
        with process_group() as processes:
            trained = TrainedRanker.open(local(ranker))
            recipe, own = trained.recipe, trained.trained_on.prepared
            folder = recipe.folder if data is None else DataFolder.of(data, own.schema.columns_alone)
            parts = trained.parts(
                Path(prepared) if prepared is not None else None, data=folder, sids=tuple(map(Path, sids))
            )
            # of the sequences prepared anew only the items count: the ranker's users and tasks are its own
            met = replace(
                parts.prepared,
                user_features=own.user_features,
                vocabularies=own.vocabularies,
                tasks=own.tasks,
                regressions=own.regressions,
            )
            parts = replace(parts, prepared=met)
            model = parts.sharded(processes) if shared else parts.whole(processes.device)
            trained.load(model)
        items = open_items(folder, sources=(), targets=())
        rows, values = ItemRows(items), own.vocabularies
        if users is None:
            is_folder = isinstance(events, str | Path) and Path(events).is_dir()
            users = events if is_folder else folder
        log = _events(folder if events is None else events, own)
        predictor = Predictor(
            trained=trained,
            prepared=parts.prepared,
            model=model.eval(),
            collate=Collator(parts.prepared, parts.arm),
            items=items,
            rows=rows,
            log=log,
            users=UserCodes.read(_users(users, values, own.schema), values),
            values=values,
            max_history=max_history or own.max_history,
            batch_events=batch_events,
            processes=current_processes() if shared else Processes(rank=0, world_size=1, device=processes.device),
            opened=opened,
        )
        if read:
            _ = predictor.known
        return predictor

    def __reduce__(self) -> Any:
        return _open, (self.opened,)

    @cached_property
    def known(self) -> Known:
        """What requests are joined with by default; holds ``log``.

        Raises:
            DataError: on bad events; names file, column and row.
        """
        return self.joining(Histories.read(self.log, self.rows, self._own.policy, self._own.features))

    def joining(self, histories: Histories, users: UserCodes | None = None) -> Known:
        """What requests are joined with: these events, and these users, or those by default."""
        own = self._own
        return Known(self.rows, histories, users or self.users, own.features, len(own.regressions))

    @property
    def _own(self) -> Prepared:
        """What the ranker was trained on."""
        return self.trained.trained_on.prepared

    @property
    def names(self) -> list[str]:
        """What predictions are called: ``probability``, or one ``probability_TASK`` for each of several tasks; ``predicted_TASK`` is a value."""
        tasks, values = self.prepared.tasks, [f"predicted_{own.name}" for own in self.prepared.regressions]
        return (
            ["probability"] if len(tasks) == 1 and not values else [*(f"probability_{task}" for task in tasks), *values]
        )

    @property
    def newest_schema(self) -> pa.Schema:
        """Columns of each user's last events, as requests."""
        return newest_schema(self.log.user_id_type, self.items.ids().type)

    def newest(self, count: int) -> NewestEvents:
        """Each user's last ``count`` events as requests."""
        return NewestEvents(self.items, self.known.histories, count)

    def predict(self, requests: Any, *, events: Any = None, users: Any = None) -> Any:
        """Probabilities of a table of requests, a row each; on every process of a group, if there is one.

        Args:
            requests: a frame, of pandas, Polars, DuckDB, Arrow or Hugging Face (see ``data.frames.read_frame``), with the columns
                ``user_id``, ``item_id`` and ``timestamp``, and those of the features that are known of a target; others are left
                unread. A user's history is all events strictly before the timestamp.
            events: where histories come from, for this call; see ``open``. None for those it was opened with.
            users: likewise.

        Returns:
            Of a pandas DataFrame a Series ``probability`` with its index, or with several tasks a DataFrame of ``names``; else
            float32 [R], or with several tasks [R, K].

        Raises:
            DataError: on a missing column, one of the wrong type, a null, a time below 0, or an unknown item.
        """
        probability_RK = self._predict(requests, events, users)
        pandas = sys.modules.get("pandas")
        if pandas is not None and isinstance(requests, pandas.DataFrame):
            frame = pandas.DataFrame(probability_RK, index=requests.index, columns=self.names)
            return frame if len(self.names) > 1 else frame[self.names[0]]
        return probability_RK if len(self.names) > 1 else probability_RK[:, 0]

    def predict_table(self, requests: Any, *, events: Any = None, users: Any = None) -> pa.Table:
        """The requests with their probabilities: Arrow, which ``polars.from_arrow``, ``duckdb.from_arrow`` and ``to_pandas`` take.

        Args:
            requests: as ``predict`` has it, and so are
            events: and
            users: likewise.

        Returns:
            Every column of the requests, in the order of their rows, and those that ``names`` names, float32. An index of pandas
            is left out.

        Raises:
            DataError: as ``predict``, and on a column that is to be added and there already.
        """
        table = read_frame(requests, "requests")
        added = self._predict(table, events, users)
        return with_columns(table, dict(zip(self.names, map(pa.array, added.T), strict=True)), "requests")

    def _predict(self, requests: Any, events: Any, users: Any) -> np.ndarray:
        """float32 [R, K]."""
        own, log = self._own, None if events is None else _events(events, self.prepared)
        histories = self.known.histories if log is None else Histories.read(log, self.rows, own.policy, own.features)
        known = self.joining(
            histories,
            None if users is None else UserCodes.read(_users(users, self.values, self.prepared.schema), self.values),
        )
        columns = (*EVENT_IDS, *(feature.name for feature in self.prepared.features.event))
        table = ArrowTable.of(read_frame(requests, "requests", columns), "requests")
        given = GivenRequests(table, self.prepared.schema.time_unit or "s")
        scores = [
            np.empty((0, len(self.names)), np.float32),
            *(scored.probability_RK for scored in self.score(given, known)),
        ]
        return np.concatenate(scores)

    def score(self, requests: Requests, known: Known | None = None, *, first: int = 0) -> Iterator[Scored]:
        """Batches of requests, in their order; the same on every process.

        Args:
            requests: to read.
            known: what they are joined with; None for what the predictor was opened with.
            first: batches to leave out, which have been scored before.
        """
        known = self.known if known is None else known
        for batch in islice(requests.batches(known), first, None):
            probability_RK = self._probabilities(batch, known.histories)
            yield Scored(batch.columns, batch.begins == batch.ends, probability_RK)

    @torch.no_grad()
    def _probabilities(self, batch: RequestBatch, histories: Histories) -> np.ndarray:
        """Each process scores its share of the rows and adds it to what are zeros elsewhere."""
        rank, world_size = self.processes.rank, self.processes.world_size
        rows = batch.rows(_TARGETS_PER_ROW)
        events = np.minimum(batch.ends - batch.begins, self.max_history)
        lengths = np.array([events[row[0]] + len(row) for row in rows], np.int64)
        probability_RK = torch.zeros(len(batch), len(self.names))
        for together in cut_by_length(lengths, self.batch_events):
            share = together[rank::world_size]
            # a process without a row computes one too, as all must take part in looking embeddings up
            chosen = [rows[i] for i in share or together[:1]]
            sequences = [batch.sequence(row, histories, self.max_history) for row in chosen]
            _, output = self.model(self.collate(sequences).to(self.processes.device))
            if share:
                probability_RK[np.concatenate(chosen)] = output.prediction.float().cpu()
        if world_size > 1:
            sum_over_processes(probability_RK)
        return probability_RK.numpy()


def _open(opened: dict[str, Any]) -> Predictor:
    return Predictor.open(**opened, read=False)


def _events(source: Any, prepared: Prepared) -> Events:
    """With the labels and features that the ranker's histories have."""
    tasks = () if prepared.sampled_negatives else prepared.tasks
    schema = replace(prepared.schema, event_weight="")  # nothing is weighed
    if isinstance(source, str | Path | DataFolder):
        events = open_events(source, tasks, schema.columns_alone)
    else:
        columns = (*EVENT_IDS, *tasks, *prepared.features.columns)
        events = events_of(ArrowTable.of(read_frame(source, "events", columns), "events"), tasks, schema)
    for name in prepared.features.columns:
        events.table.type_of(name, what="feature")  # its values are checked as they are read
    # no tasks, even if there is a column of labels
    return replace(events, tasks=tasks, features=prepared.features.named, weight="")


def _users(source: Any, values: dict[str, Any], schema: DataSchema) -> Users | None:
    if not values:
        return None
    if not isinstance(source, str | Path | DataFolder):
        return users_of(ArrowTable.of(read_frame(source, "users", ("user_id", *values)), "users"), schema)
    users = open_users(source, schema.columns_alone)
    if users is None:
        raise DataError(
            f"{DataFolder.of(source).where('users')}: no such file; the ranker reads {', '.join(values)} of it: name it with --users"
        )
    return users
