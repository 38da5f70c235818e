"""What is predicted of an event, a label per task; and what the event says to later ones, all its labels as one action.

An action is the labels' digits in base 3, the first task's the lowest: with one task it is the label itself.
"""

from typing import TypeVar

import numpy as np
from torch import Tensor

DEFAULT_TASKS = ("label",)  # where none is named
UNKNOWN = 2  # the digit of a missing label, beside 0 for a negative and 1 for a positive
MAX_TASKS = 4  # 81 actions, an int8

Actions = TypeVar("Actions", np.ndarray, Tensor)


def num_actions(num_tasks: int) -> int:
    """Actions are 0 .. num_actions - 1. The label of a single task is never missing."""
    return 2 if num_tasks == 1 else 3**num_tasks


def action_of(labels_NK: np.ndarray) -> np.ndarray:
    """The action of each event, int8 [N], given its labels, int8 [N, K] of 0, 1 and UNKNOWN."""
    return (labels_NK @ 3 ** np.arange(labels_NK.shape[1])).astype(np.int8)


def label_of(actions: Actions, task: int) -> Actions:
    """The labels of one task, by its place: 0, 1 or UNKNOWN, of the shape of ``actions``."""
    return actions // 3**task % 3


def check_tasks(names: tuple[str, ...]) -> None:
    """Raises ValueError unless the names are distinct, and not too many."""
    if len(set(names)) != len(names) or len(names) > MAX_TASKS:
        raise ValueError(f"name each task once, and {MAX_TASKS} tasks at most, got '{','.join(names)}'")
