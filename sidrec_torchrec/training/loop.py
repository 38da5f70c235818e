"""The training loop: epochs, seeds, rates, validation, the best epoch, checkpoints, curves. Everything trained goes through it.

What is trained is a ``Trainee``: it knows its model, batches and losses, and nothing of the above.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.training.checkpoints import BEST, LAST, Checkpoints
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.progress import Stage, say, stage

CHECKPOINTS = "checkpoints"
_TRAIN = "train "  # how the names of an epoch's losses begin, beside those of validation

Values = dict[str, float | None]


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

    @abstractmethod
    def steps(self, epoch: int, first: int, before_step: Callable[[], None]) -> Iterator[Step]:
        """Trains on the batches of an epoch from number ``first`` on; yields after each.

        Args:
            epoch: from 0.
            first: batches to leave out, which an interrupted run has trained on already.
            before_step: to be called before each batch is trained on; sets seeds and rates.
        """

    @abstractmethod
    def seed(self, epoch: int, batch: int) -> None:
        """Seeds what the batch draws, so that an interrupted run ends as a whole one does."""

    @abstractmethod
    def validate(self, progress: Stage) -> Values:
        """Metrics that choose the epoch, the same on every process; shown as ``progress`` advances."""

    @abstractmethod
    def score(self, values: Values) -> float | None:
        """Of the values of an epoch, what is best when least; None where that is not known."""

    @abstractmethod
    def total(self, losses: dict[str, float]) -> float:
        """One figure of the K mean losses, to be shown."""

    def begin(self) -> None:
        """Called once, before a run that does not resume."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, and when to keep what.

    Args:
        epochs: passes over the training data.
        checkpoint_batches: batches between two checkpoints within an epoch; None for none. One is made after each epoch.
        patience: epochs without improvement after which training stops; None to go on to the end.
    """

    epochs: int
    checkpoint_batches: int | None = None
    patience: int | None = None


@dataclass
class Course:
    """How training went.

    Args:
        epochs: by epoch, the mean of each loss as ``train NAME``, and the values of validation.
        best: the epoch whose model is kept.
        seconds: of training, without validation.
    """

    epochs: list[Values] = field(default_factory=list)
    best: int = 0
    seconds: float = 0.0

    def training(self) -> list[dict[str, float]]:
        """The mean of each loss, by epoch trained."""
        losses = [
            {k.removeprefix(_TRAIN): v for k, v in epoch.items() if k.startswith(_TRAIN) and v is not None}
            for epoch in self.epochs
        ]
        return [epoch for epoch in losses if epoch]

    def validation(self) -> list[Values]:
        """What validation said, by epoch."""
        return [{k: v for k, v in epoch.items() if not k.startswith(_TRAIN)} for epoch in self.epochs]


class Loop:
    """One run of training: goes on from the folder's last checkpoint, if there is one.

    Args:
        trainee: what to train.
        config: for how long.
        folder: for checkpoints and TensorBoard's curves.
        processes: the group; every process runs the loop.
    """

    def __init__(self, trainee: Trainee, config: LoopConfig, folder: Path, processes: Processes) -> None:
        self._trainee = trainee
        self._config = config
        self._processes = processes
        self._checkpoints = Checkpoints(folder / CHECKPOINTS)
        self._curves = SummaryWriter(folder / "tensorboard") if processes.is_main else None
        self._course = Course()
        self._batch = 0  # batches of this epoch that were trained on
        self._done = 0.0  # of the epoch's size
        self._before = self._zeros()  # sums and counts of this epoch up to the last checkpoint, over all processes
        self._since = self._zeros()  # and since, of this process

    def run(self) -> Course:
        """Trains to the end, and leaves the weights of the best epoch in the model.

        Raises:
            SidrecError: if training diverges, or a checkpoint cannot be written or read; checkpoints stay as they are.
        """
        if self._checkpoints.has(LAST):
            self._resume()
        else:
            self._trainee.begin()
            if self._trainee.starts_trained:
                self._end_epoch(self._validate())
        while not self._is_over():
            self._end_epoch(self._train_epoch() | self._validate())
        if self._processes.is_main:
            best = self._course.best + (not self._trainee.starts_trained)
            say(f"{self._trainee.name}: the best epoch is {best} of {self._epoch}")
        state = {"model": self._trainee.model.state_dict()}
        self._checkpoints.load(BEST, state)
        self._trainee.model.load_state_dict(state["model"])
        if self._curves is not None:
            self._curves.close()
        return self._course

    @property
    def _epoch(self) -> int:
        """Epochs trained on."""
        return len(self._course.epochs) - self._trainee.starts_trained

    def _is_over(self) -> bool:
        patience = self._config.patience
        waited = len(self._course.epochs) - 1 - self._course.best
        return self._epoch >= self._config.epochs or (patience is not None and waited >= patience)

    def _train_epoch(self) -> Values:
        trainee, course = self._trainee, self._course
        trainee.model.train()
        epoch, started, seconds_before = self._epoch, time.monotonic(), course.seconds
        title = f"{trainee.name} epoch {epoch + 1}/{self._config.epochs}"
        show = {"show": self._processes.is_main, "line": self._is_told(epoch + 1)}
        with stage(title, trainee.epoch_size, **show) as progress:
            progress.advance(self._done)
            for step in trainee.steps(epoch, self._batch, self._before_step):
                self._batch += 1
                self._done += step.amount
                self._since += torch.stack([step.loss_sums, step.counts]).to(self._since)
                course.seconds = seconds_before + time.monotonic() - started
                self._show(progress, step)
                if self._config.checkpoint_batches and self._batch % self._config.checkpoint_batches == 0:
                    self._save(LAST)
        self._share_sums()
        losses = self._means(self._before)
        if not all(map(math.isfinite, losses.values())):
            raise SidrecError(f"{trainee.name}: training diverged in epoch {epoch + 1}; lower the learning rate")
        return {_TRAIN + name: value for name, value in losses.items()}

    def _before_step(self) -> None:
        self._trainee.seed(self._epoch, self._batch)
        progress = (self._epoch + self._done / self._trainee.epoch_size) / self._config.epochs
        self._trainee.optimizer.set_progress(progress)

    def _show(self, progress: Stage, step: Step) -> None:
        if self._curves is None:  # not the main process
            return
        progress.advance(step.amount, f"loss {self._trainee.total(self._means(self._before + self._since)):.4f}")
        own = self._trainee.total(self._means(torch.stack([step.loss_sums, step.counts])))
        self._curves.add_scalar("train/loss", own, int(self._epoch * self._trainee.epoch_size + self._done))

    @torch.no_grad()
    def _validate(self) -> Values:
        trainee = self._trainee
        trainee.model.eval()
        epoch = len(self._course.epochs) + (not trainee.starts_trained)
        title = f"{trainee.name} validation {epoch}/{self._config.epochs}"
        show = {"show": self._processes.is_main, "line": self._is_told(epoch)}
        with stage(title, trainee.validation_size, **show) as progress:
            return trainee.validate(progress)

    def _is_told(self, epoch: int) -> bool:
        """Whether a line of the log is spent on an epoch, counted from 1; about ten of them are worth one."""
        return epoch % max(1, round(self._config.epochs / 10)) == 0

    def _end_epoch(self, values: Values) -> None:
        """Keeps the model if it is the best so far, and moves on."""
        course = self._course
        course.epochs.append(values)
        scores = [self._trainee.score(epoch) for epoch in course.epochs]
        last = len(scores) - 1
        # without a score the last epoch is kept
        course.best = min(range(len(scores)), key=lambda e: (scores[e], e)) if None not in scores else last
        self._batch, self._done = 0, 0.0
        self._before, self._since = self._zeros(), self._zeros()
        if course.best == last:
            self._checkpoints.save(BEST, {"model": self._trainee.model.state_dict()})
        if self._curves is not None:
            at = int(self._epoch * self._trainee.epoch_size)
            for name, value in values.items():
                if value is not None:
                    is_loss = name.startswith(_TRAIN)
                    tag = f"epoch/{name.removeprefix(_TRAIN)}" if is_loss else f"validation/{name}"
                    self._curves.add_scalar(tag, value, at)
            self._curves.flush()
        self._save(LAST)

    def _zeros(self) -> Tensor:
        return torch.zeros(2, len(self._trainee.losses), dtype=torch.float64, device=self._processes.device)

    def _share_sums(self) -> None:
        dist.all_reduce(self._since)
        self._before, self._since = self._before + self._since, self._zeros()

    def _means(self, sums_2K: Tensor) -> dict[str, float]:
        sums, counts = sums_2K.tolist()
        return {n: s / max(c, 1) for n, s, c in zip(self._trainee.losses, sums, counts, strict=True)}

    def _save(self, name: str) -> None:
        self._share_sums()
        place = {
            "batch": self._batch,
            "done": self._done,
            "sums": self._before.tolist(),
            "course": asdict(self._course),
        }
        trainee = self._trainee
        state = {"model": trainee.model.state_dict(), "optimizer": trainee.optimizer.state_dict()}
        # as text: checkpoints would take a list apart
        self._checkpoints.save(name, state | {"place": json.dumps(place)})

    def _resume(self) -> None:
        trainee = self._trainee
        optimizer = trainee.optimizer.state_to_load()
        state: dict[str, Any] = {"model": trainee.model.state_dict(), "optimizer": optimizer, "place": ""}
        self._checkpoints.load(LAST, state)
        trainee.model.load_state_dict(state["model"])
        trainee.optimizer.load_state_dict(state["optimizer"])
        place = json.loads(state["place"])
        self._batch, self._done = place["batch"], place["done"]
        self._before = torch.tensor(place["sums"]).to(self._since)
        self._course = Course(**place["course"])
