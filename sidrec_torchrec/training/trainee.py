"""What is trained: it knows its model, batches and losses, and nothing of epochs, checkpoints or the best one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from sidrec_torchrec.errors import DivergedError
from sidrec_torchrec.training.measures import Waits
from sidrec_torchrec.training.progress import Stage

Values = dict[str, float | None]


class NotFiniteError(DivergedError):
    """Says what of a step is not finite; the loop says which step. Raised on every process alike, before a weight changes."""


class Optimizer(Protocol):
    """What the loop asks of an optimizer."""

    def set_progress(self, progress: float) -> None:
        """Sets the rates for ``progress`` in [0, 1) of training, as it is before the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""

    def state_to_load(self) -> dict[str, Any]:
        """A state of the right shape, for a checkpoint to fill in place."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what a checkpoint kept."""

    def measures(self) -> dict[str, float]:
        """The norm of the gradients of the last step, and the rates, by name."""


@dataclass(frozen=True)
class Step:
    """What a batch was.

    Args:
        amount: its share of an epoch's ``epoch_size``, over all processes.
        loss_sums: float [K], sums of K losses over this process's share.
        counts: float [K], how many values each is a sum of.
    """

    amount: float
    loss_sums: Tensor
    counts: Tensor


class Trainee(ABC):
    """What the loop trains.

    Attributes:
        name: for progress and messages.
        model: whose state is kept.
        optimizer: on the loop's schedule.
        losses: names of the K losses of a ``Step``.
        epoch_size: what the amounts of an epoch's steps add up to.
        validation_size: what validation advances its progress by in all; None if it does not.
        starts_trained: whether the model is worth validating before the first epoch; that is epoch 0.
    """

    name: str
    model: nn.Module
    optimizer: Optimizer
    losses: tuple[str, ...]
    epoch_size: float
    validation_size: float | None = None
    starts_trained = False

    @cached_property
    def waits(self) -> Waits:
        """How long training waits for data; ``steps`` takes batches through its ``timed``."""
        return Waits()

    @abstractmethod
    def steps(self, epoch: int, first: int, before_step: Callable[[], None]) -> Iterator[Step]:
        """Trains on the batches of an epoch from number ``first`` on; yields after each.

        Args:
            epoch: from 0.
            first: batches to leave out, which an interrupted run has trained on already.
            before_step: to be called before each batch is trained on; sets seeds and rates.

        Raises:
            NotFiniteError: on every process, if a gradient is not finite.
        """

    @abstractmethod
    def batch(self, epoch: int, number: int) -> dict[str, np.ndarray]:
        """This process's share of a batch of ``steps``, by name, for whoever asks why training failed there."""

    @abstractmethod
    def seed(self, epoch: int, batch: int) -> None:
        """Seeds what the batch draws, so that an interrupted run ends as a whole one does."""

    @abstractmethod
    def validate(self, progress: Stage) -> Values:
        """Metrics that choose the epoch, the same on every process.

        Args:
            progress: to be advanced after each batch, as often on every process; there the job can be stopped.

        Raises:
            NotFiniteError: on every process, if predictions are not finite.
        """

    @abstractmethod
    def score(self, values: Values) -> float | None:
        """Of the values of an epoch, what is best when least; None where it is not defined, say without positives."""

    @abstractmethod
    def total(self, losses: dict[str, float]) -> float:
        """One figure of the K mean losses, to be shown."""

    def begin(self) -> None:
        """Called once, before a run that does not resume."""
