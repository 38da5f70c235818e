"""What is predicted of an event, a label per task; and what the event says to later ones, all its labels as one action.

An action is the labels' digits in base 3, the first task's the lowest: with one task it is the label itself. Tasks of regression,
``dwell:regression`` or ``dwell:log``, are no part of it; see ``data.regression``.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:  # processes that cut logs need no torch
    from torch import Tensor

DEFAULT_TASKS = ("label",)  # where none is named
UNKNOWN = 2  # the digit of a missing label, beside 0 for a negative and 1 for a positive
MAX_TASKS = 4  # 81 actions, an int8

Actions = TypeVar("Actions", np.ndarray, "Tensor")


@dataclass(frozen=True)
class RegressionName:
    """A task of regression as it is named.

    Args:
        column: of the log.
        is_log: whether log(1 + y) is learned of a value y.
    """

    column: str
    is_log: bool = False

    def __str__(self) -> str:
        return f"{self.column}:{'log' if self.is_log else 'regression'}"


def split_tasks(names: Iterable[str]) -> tuple[tuple[str, ...], tuple[RegressionName, ...]]:
    """Columns of labels that are 0 or 1, and tasks of regression, of what ``--tasks`` names."""
    labels: list[str] = []
    regressions: list[RegressionName] = []
    for name in names:
        column, _, kind = name.rpartition(":")
        if column and kind in ("regression", "log"):
            regressions.append(RegressionName(column, kind == "log"))
        else:
            labels.append(name)
    return tuple(labels), tuple(regressions)


def num_actions(num_tasks: int) -> int:
    """Actions are 0 .. num_actions - 1. The label of a single task is never missing; without one all actions are 1."""
    return 2 if num_tasks <= 1 else 3**num_tasks


def action_of(labels_NK: np.ndarray) -> np.ndarray:
    """The action of each event, int8 [N], given its labels, int8 [N, K] of 0, 1 and UNKNOWN."""
    return (labels_NK @ 3 ** np.arange(labels_NK.shape[1])).astype(np.int8)


def label_of(actions: Actions, task: int) -> Actions:
    """The labels of one task, by its place: 0, 1 or UNKNOWN, of the shape of ``actions``."""
    return actions // 3**task % 3


def check_tasks(names: tuple[str, ...]) -> None:
    """Raises ValueError unless the columns are distinct, and not too many are of labels."""
    labels, regressions = split_tasks(names)
    columns = {*labels, *(named.column for named in regressions)}
    if len(columns) != len(names) or len(labels) > MAX_TASKS:
        raise ValueError(f"name each task once, and {MAX_TASKS} tasks at most, got '{','.join(names)}'")
