"""Regression: what is predicted of an event as a number, say a dwell time or a rating, beside labels that are 0 or 1.

Such a number is a target's own: it is no part of the event's action, and histories have it only as a history feature, if it is
named as one. It is learned on a scale of its own, on which training has mean 0 and deviation 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidrec_torchrec.data.tasks import RegressionName
from sidrec_torchrec.errors import DataError


@dataclass(frozen=True)
class Regression:
    """A regression task and its scale.

    Args:
        name: its column.
        is_log: whether it is log(1 + y) that is learned of a value y, for values of many sizes.
        mean: of training targets, of log(1 + y) if that is learned.
        deviation: likewise; above 0.
    """

    name: str
    is_log: bool
    mean: float
    deviation: float

    @property
    def named(self) -> RegressionName:
        """As ``--tasks`` names it."""
        return RegressionName(self.name, self.is_log)


class Moments:
    """Mean and deviation of weighted values, in one pass.

    Args:
        named: the task whose values they are.
    """

    def __init__(self, named: RegressionName) -> None:
        self.named = named
        self.count = 0
        self.weight = self.mean = self._squares = 0.0
        self._least, self._most = np.inf, -np.inf

    def add(self, value_N: np.ndarray, weight_N: np.ndarray | None = None) -> None:
        """Takes values, NaN where missing, each with its weight; None for 1 each."""
        known_N = ~np.isnan(value_N)
        self.count += int(known_N.sum())
        if weight_N is not None:
            known_N &= weight_N > 0
        x_M = value_N[known_N].astype(np.float64)
        w_M = np.ones(len(x_M)) if weight_N is None else weight_N[known_N].astype(np.float64)
        weight = w_M.sum()
        if not len(x_M):
            return
        self._least, self._most = min(self._least, x_M.min()), max(self._most, x_M.max())
        if self.named.is_log:
            x_M = np.log1p(x_M)
        mean = (w_M * x_M).sum() / weight
        self._take(weight, mean, (w_M * (x_M - mean) ** 2).sum())

    def merge(self, other: "Moments") -> None:
        """Takes the values that another has taken."""
        self.count += other.count
        self._least, self._most = min(self._least, other._least), max(self._most, other._most)
        if other.weight:
            self._take(other.weight, other.mean, other._squares)

    def _take(self, weight: float, mean: float, squares: float) -> None:
        total, step = self.weight + weight, mean - self.mean
        # Chan, Golub and LeVeque 1983: nothing cancels, however far from 0 the values are
        self._squares += squares + step**2 * self.weight * weight / total
        self.mean += step * weight / total
        self.weight = total

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` takes."""
        numbers = {name: float(getattr(self, name)) for name in ("weight", "mean", "_squares")}
        extremes = [float(self._least), float(self._most)] if self.weight else None  # JSON has no infinity
        return {"count": self.count, **numbers, "extremes": extremes}

    @staticmethod
    def from_json(named: RegressionName, values: dict[str, Any]) -> "Moments":
        """Those that ``to_json`` told of."""
        own = Moments(named)
        for name in ("count", "weight", "mean", "_squares"):
            setattr(own, name, values[name])
        if values["extremes"] is not None:
            own._least, own._most = values["extremes"]
        return own

    @property
    def deviation(self) -> float:
        """0 without values."""
        return float(np.sqrt(self._squares / self.weight)) if self.weight else 0.0

    def check(self, path: Path, where: str) -> None:
        """Refuses values from which nothing can be learned.

        Args:
            path: of the log.
            where: they are, for the message.

        Raises:
            DataError: if there is none of any weight, or all are the same; names the column.
        """
        what = None if self._least < self._most else f"is {self._least:g}" if self.weight else "is null"
        if what is not None:
            raise DataError(
                f"{path}: column '{self.named.column}' {what} for all {where}; a regression learns from values that differ: leave "
                "the task out"
            )

    def regression(self) -> Regression:
        """The task on the scale of these values, which ``check`` has let pass."""
        return Regression(self.named.column, self.named.is_log, float(self.mean), self.deviation)


def from_json(values: list[dict[str, Any]]) -> tuple[Regression, ...]:
    """Those that ``dataclasses.asdict`` wrote."""
    return tuple(Regression(**value) for value in values)
