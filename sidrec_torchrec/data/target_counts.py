"""What a log says of what is to be predicted: whether there is anything to learn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidrec_torchrec.data.regression import Moments
from sidrec_torchrec.data.tasks import RegressionName
from sidrec_torchrec.errors import DataError


@dataclass
class TargetCounts:
    """What a log says of its targets. Made by ``TargetCounts.of``.

    Args:
        counts_K2: int64, negatives and positives by task.
        moments: by task of regression.
    """

    counts_K2: np.ndarray
    moments: list[Moments]

    @staticmethod
    def of(tasks: tuple[str, ...], regressions: tuple[RegressionName, ...]) -> "TargetCounts":
        """Of no event yet."""
        return TargetCounts(np.zeros((len(tasks), 2), np.int64), [Moments(named) for named in regressions])

    def add(self, labels_NK: np.ndarray, values_NR: np.ndarray) -> None:
        """Takes labels and values of events."""
        for value in (0, 1):
            self.counts_K2[:, value] += (labels_NK == value).sum(axis=0)
        for own, value_N in zip(self.moments, values_NR.T, strict=True):
            own.add(value_N)

    def merge(self, other: "TargetCounts") -> None:
        """Takes what another share of the log says."""
        self.counts_K2 += other.counts_K2
        for own, its in zip(self.moments, other.moments, strict=True):
            own.merge(its)

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        return {"counts": self.counts_K2.tolist(), "moments": [own.to_json() for own in self.moments]}

    @staticmethod
    def from_json(regressions: tuple[RegressionName, ...], values: dict[str, Any]) -> "TargetCounts":
        """Those that ``to_json`` told of."""
        moments = [Moments.from_json(named, its) for named, its in zip(regressions, values["moments"], strict=True)]
        return TargetCounts(np.array(values["counts"], np.int64).reshape(-1, 2), moments)

    def check(self, path: Path, tasks: tuple[str, ...], num_events: int) -> None:
        """Refuses targets from which nothing can be learned.

        Args:
            path: of the log.
            tasks: names of its labels.
            num_events: of the whole log.

        Raises:
            DataError: if all labels of a task, or all values of a regression, are the same; names the column.
        """
        for own in self.moments:
            own.check(path, "events")
        for task, counts_2 in zip(tasks, self.counts_K2, strict=True):
            if not counts_2.all():
                rows = f"{counts_2.sum()} rows" + " that have it" * bool(counts_2.sum() < num_events)
                raise DataError(
                    f"{path}: column '{task}' is {int(counts_2[1] > 0)} in all {rows}; a ranker needs both classes. "
                    "If every event is a positive, leave the column out"
                )
