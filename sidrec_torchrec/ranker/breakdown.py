"""NE where it matters: test targets by how popular and how old their item is, how much they read, how old the model is."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.target_sums import NUM_SUMS, TargetSums
from sidrec_torchrec.ranker.targets import Targets

_DAY = 86_400


@dataclass(frozen=True)
class Table:
    """A way to sort targets into buckets.

    Args:
        title: what they are sorted by, in words.
        edges: of a value in bucket b, edges[b - 1] <= value < edges[b].
        buckets: their names, one more than edges.
    """

    title: str
    edges: tuple[int, ...]
    buckets: tuple[str, ...]


# Edges are the same for every log and arm, so that tables compare; they are close together where items and users are new.
TABLES = {
    "item_training_events": Table(
        "training events of the item",
        (1, 5, 20, 100, 1000),
        ("0", "1 to 4", "5 to 19", "20 to 99", "100 to 999", "1,000 and more"),
    ),
    "item_age": Table(
        "age of the item: time since its first event in the whole log",
        (1, _DAY, 7 * _DAY, 30 * _DAY),
        ("no earlier event", "under 1 day", "1 to 7 days", "7 to 30 days", "30 days and more"),
    ),
    "history_length": Table(
        "events that the target reads",
        (1, 10, 50, 200, 1000),
        ("0", "1 to 9", "10 to 49", "50 to 199", "200 to 999", "1,000 and more"),
    ),
    "model_age": Table(
        "age of the model: time since the last training event",
        (0, _DAY, 7 * _DAY, 30 * _DAY),
        ("before it", "under 1 day", "1 to 7 days", "7 to 30 days", "30 days and more"),
    ),
}


@dataclass(frozen=True)
class Past:
    """What is known of I items, and of training; None where it is not. Made by ``of``.

    Args:
        seen_I: bool, whether the item occurs in training.
        training_events_I: int64, training targets on it.
        first_event_I: int64, time of its first event in the whole log.
        last_training_event: time of the last training target.
    """

    seen_I: np.ndarray
    training_events_I: np.ndarray | None
    first_event_I: np.ndarray | None
    last_training_event: int | None

    @staticmethod
    def of(prepared: Prepared) -> "Past":
        """Of sequences that a ranker is tested on, as it sees them: with its own training, see ``data.seen_by``."""
        return Past(
            seen_I=prepared.seen(),
            training_events_I=prepared.training_events(),
            first_event_I=prepared.first_events(),
            last_training_event=prepared.last_training_event,
        )


@dataclass(frozen=True)
class TargetFacts:
    """S targets of a batch, in the order of a ranker's output.

    Args:
        item_S: rows of the item file.
        user_S: int64, the number of each one's user; see ``data.ids.seed_of``.
        time_S: int64.
        history_S: int64, how many events each reads.
    """

    item_S: np.ndarray
    user_S: np.ndarray
    time_S: np.ndarray
    history_S: np.ndarray

    @staticmethod
    def of(batch: RankBatch) -> "TargetFacts":
        """Of a batch on the CPU."""
        targets = Targets.of(batch)
        return TargetFacts(
            item_S=batch.item_N[targets.event_S].numpy(),
            user_S=batch.user_B[targets.row_S].numpy(),
            time_S=batch.timestamp_N[targets.event_S].numpy(),
            history_S=(targets.end_S - targets.begin_S).numpy(),
        )

    def value(self, table: str, past: Past) -> np.ndarray | None:
        """What the table sorts targets by, int64 [S]; None where it is not known."""
        if table == "history_length":
            return self.history_S
        if table == "item_training_events" and past.training_events_I is not None:
            return past.training_events_I[self.item_S]
        if table == "item_age" and past.first_event_I is not None:
            return self.time_S - past.first_event_I[self.item_S]
        if table == "model_age" and past.last_training_event is not None:
            return self.time_S - past.last_training_event
        return None


class Breakdown:
    """Accumulates predictions by bucket: five sums for each, whatever the number of targets.

    Args:
        past: what targets are sorted by.
        targets: what is summed of each.
        device: where predictions are.
    """

    def __init__(self, past: Past, targets: TargetSums, device: torch.device) -> None:
        self._past = past
        self._targets = targets
        self._sums = {
            name: torch.zeros(len(table.buckets), len(targets.tasks), NUM_SUMS, dtype=torch.float64, device=device)
            for name, table in TABLES.items()
        }

    def update(self, output: RankerOutput, facts: TargetFacts) -> None:
        """Takes one batch's predictions."""
        sums_SK5 = self._targets.of(output)
        for name, table in TABLES.items():
            value_S = facts.value(name, self._past)
            if value_S is not None:
                bucket_S = torch.from_numpy(np.searchsorted(table.edges, value_S, side="right"))
                self._sums[name].index_add_(0, bucket_S.to(sums_SK5.device), sums_SK5)

    def compute(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """By table and task, a row for each bucket; the same on every process.

        A row has ``bucket``, ``targets``, ``positives``, ``ne`` and ``calibration``, and a ``note`` where NE is not defined
        (None): the bucket has no targets, or those of one class. Calibration is the mean prediction over the mean label,
        None without positives. Of a regression it has ``bucket``, ``targets`` and ``nmse`` (see ``RankingMetrics.compute``), a ``note``
        where that is None, and ``calibration``. A table that nothing is known of is left out.
        """
        tables = {}
        for name, sums_BK5 in self._sums.items():
            sums_BK5 = sums_BK5.clone()
            if dist.is_initialized():
                dist.all_reduce(sums_BK5)
            if sums_BK5.any():
                tables[name] = {
                    task: [self._row(*row, k) for row in zip(TABLES[name].buckets, sums_BK5[:, k].cpu(), strict=True)]
                    for k, task in enumerate(self._targets.tasks)
                }
        return tables

    def _row(self, bucket: str, sums_5: Tensor, k: int) -> dict[str, Any]:
        is_label = k < len(self._targets.labels)
        value = self._targets.ratio(sums_5, k).item()
        _, targets, positives, negatives, predictions = sums_5.tolist()
        row: dict[str, Any] = {"bucket": bucket, "targets": round(targets)}
        if is_label:
            row["positives"] = round(positives)
        row["ne" if is_label else "nmse"] = None if math.isnan(value) else value
        row["calibration"] = predictions / positives if positives else None
        if math.isnan(value):
            row["note"] = _note_on_labels(positives, negatives) if is_label else _note_on_values(targets)
        return row


def _note_on_labels(positives: float, negatives: float) -> str:
    return "positives alone" if positives else "negatives alone" if negatives else "no targets"


def _note_on_values(targets: float) -> str:
    return "the training mean alone" if targets else "no targets"
