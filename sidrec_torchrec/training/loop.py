"""The training loop: epochs, seeds, rates, validation, the best epoch, checkpoints, curves. Everything trained goes through it."""

import json
import math
import signal
import time
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sidrec_torchrec.errors import DivergedError, PreemptedError, SidrecError
from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.output import warn
from sidrec_torchrec.training.agreement import Agreement, Signals, Wish, catch_signals
from sidrec_torchrec.training.checkpoints import BEST, LAST, Checkpoints, epoch_name
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.measures import Measures
from sidrec_torchrec.training.profiler import Profiler
from sidrec_torchrec.training.progress import Stage, say, stage
from sidrec_torchrec.training.random_state import random_state, set_random_state
from sidrec_torchrec.training.trackers import Trackers
from sidrec_torchrec.training.trainee import NotFiniteError, Step, Trainee, Values

CHECKPOINTS = "checkpoints"
_TRAIN = "train "  # how the names of an epoch's losses begin, beside those of validation


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long to train, and when to keep what.

    Args:
        epochs: passes over the training data.
        checkpoint_batches: batches between two checkpoints within an epoch; None for none. One is made after each epoch.
        checkpoint_minutes: minutes between two, besides.
        keep_epochs: of how many of the last epochs the states are kept, too, to go back to.
        patience: epochs without improvement after which training stops; None to go on to the end.
        profile: first and last batch to trace, such as ``10:20``, counted from 1 where the process begins; empty for none.
    """

    epochs: int
    checkpoint_batches: int | None = None
    checkpoint_minutes: float = math.inf
    keep_epochs: int = 0
    patience: int | None = None
    profile: str = ""


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

    A run that was stopped at any moment and called again ends as one that was not, bit for bit, with as many processes.

    Args:
        trainee: what to train.
        config: for how long.
        folder: for checkpoints and traces.
        processes: the group; every process runs the loop.
        trackers: where losses and measures go.
    """

    def __init__(
        self, trainee: Trainee, config: LoopConfig, folder: Path, processes: Processes, trackers: Trackers
    ) -> None:
        self._trainee = trainee
        self._config = config
        self._folder = folder
        self._processes = processes
        self._checkpoints = Checkpoints(folder / CHECKPOINTS)
        self._trackers = trackers
        self._course = Course()
        self._batch = 0  # batches of this epoch that were trained on
        self._done = 0.0  # of the epoch's size
        self._sums = self._zeros()  # this process's sums and counts of this epoch
        self._agreement = Agreement(processes.world_size)
        self._measures = Measures(trainee.optimizer, trainee.waits, processes)
        self._seen: dict[str, float] = {}  # what the last look at training saw
        self._profiler = Profiler(config.profile, folder, processes)
        self._signals = Signals()
        self._saved_at = time.monotonic()

    def run(self) -> Course:
        """Trains to the end, and leaves the weights of the best epoch in the model.

        Raises:
            DivergedError: at the first batch that gives what is not finite; it is kept beside the checkpoints, which stay as
                they are.
            PreemptedError: after SIGTERM or SIGHUP, once a checkpoint is made.
            SidrecError: if a checkpoint cannot be written or read.
        """
        with catch_signals() as self._signals:
            if not self._resume():
                self._trainee.begin()
            if self._trainee.starts_trained and not self._course.epochs:
                self._end_epoch(self._validate())
            while not self._is_over():
                self._end_epoch(self._train_epoch() | self._validate())
        self._profiler.stop()
        if self._processes.is_main:
            say(f"{self._trainee.name}: {self._which_epoch()}")
        state = {"model": self._trainee.model.state_dict()}
        self._checkpoints.load(BEST, state)
        self._trainee.model.load_state_dict(state["model"])
        return self._course

    @property
    def _epoch(self) -> int:
        """Epochs trained on."""
        return len(self._course.epochs) - self._trainee.starts_trained

    def _which_epoch(self) -> str:
        best = self._course.best + (not self._trainee.starts_trained)
        if any(self._trainee.score(epoch) is not None for epoch in self._course.epochs):
            return f"the best epoch is {best} of {self._epoch}"
        return f"no validation target tells which epoch is best; the last, {best}, is kept"

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
            self._measures.begin()
            try:
                for step in trainee.steps(epoch, self._batch, self._before_step):
                    self._batch += 1
                    self._done += step.amount
                    self._sums += torch.stack([step.loss_sums, step.counts]).to(self._sums)
                    course.seconds = seconds_before + time.monotonic() - started
                    self._profiler.after_step()
                    self._show(progress, step, self._measures.after_step())
                    self._after_step(step)
            except NotFiniteError as error:
                self._fail(error, self._batch)
            self._measures.end()
            self._follow(self._agreement.last(self._wish()))
        sums = self._sums.clone()
        dist.all_reduce(sums)
        return {_TRAIN + name: value for name, value in self._means(sums).items()}

    def _before_step(self) -> None:
        self._trainee.seed(self._epoch, self._batch)
        progress = (self._epoch + self._done / self._trainee.epoch_size) / self._config.epochs
        self._trainee.optimizer.set_progress(progress)
        self._profiler.before_step()

    def _show(self, progress: Stage, step: Step, seen: dict[str, float] | None) -> None:
        if not self._processes.is_main:
            return
        self._seen = seen or self._seen
        loss = self._trainee.total(self._means(self._sums))
        progress.advance(step.amount, f"loss {loss:.4f}", {"loss": loss, **self._seen})
        at = int(self._epoch * self._trainee.epoch_size + self._done)
        own = self._trainee.total(self._means(torch.stack([step.loss_sums, step.counts])))
        self._trackers.log({"train/loss": own, **(seen or {})}, at)

    @torch.no_grad()
    def _validate(self) -> Values:
        trainee = self._trainee
        trainee.model.eval()
        epoch = len(self._course.epochs) + (not trainee.starts_trained)
        title = f"{trainee.name} validation {epoch}/{self._config.epochs}"
        show = {"show": self._processes.is_main, "line": self._is_told(epoch)}
        with stage(title, trainee.validation_size, **show) as progress:
            try:
                values = trainee.validate(progress.followed_by(self._between_validation_batches))
                score = trainee.score(values)
                if score is not None and not math.isfinite(score):
                    raise NotFiniteError(f"its score is {score}")
            except NotFiniteError as error:
                self._fail(f"validation after it: {error}", self._batch - 1)
            progress.numbers = {name: value for name, value in values.items() if value is not None}
            return values

    def _after_step(self, step: Step) -> None:
        is_finite = bool(step.loss_sums.isfinite().all())
        wish = self._agreement.next(self._wish() if is_finite else Wish.FAIL)
        if wish is Wish.FAIL:
            self._fail("a loss is not finite", self._batch - 1 - self._agreement.lag)
        self._follow(wish)
        every = self._config.checkpoint_batches
        if every and self._batch % every == 0:
            self._save(LAST)

    def _between_validation_batches(self) -> None:
        wish = self._agreement.next(Wish.STOP if self._signals.caught else Wish.GO_ON)
        if wish is not Wish.SAVE:  # an epoch's end is near
            self._follow(wish)

    def _wish(self) -> Wish:
        if self._signals.caught:
            return Wish.STOP
        minutes = (time.monotonic() - self._saved_at) / 60
        return Wish.SAVE if self._processes.is_main and minutes >= self._config.checkpoint_minutes else Wish.GO_ON

    def _follow(self, wish: Wish) -> None:
        if wish is Wish.FAIL:
            self._fail("a loss is not finite", self._batch - 1)
        if wish is Wish.GO_ON:
            return
        self._save(LAST)
        if wish is Wish.STOP:
            number = self._signals.caught or signal.SIGTERM
            raise PreemptedError(
                f"{self._folder}: stopped by {number.name} after batch {self._batch} of epoch {self._epoch + 1}, and kept; "
                "run again, and it goes on from there",
                number,
            )

    def _fail(self, what: object, batch: int) -> NoReturn:
        """Keeps the batch, and raises."""
        place, advice = "before the first epoch", "scale the vectors to about 1"
        if batch >= 0:
            place, advice = f"in epoch {self._epoch + 1}, batch {batch + 1}", "lower the learning rate, in a new folder"
            path = (
                self._folder / f"diverged-epoch-{self._epoch + 1}-batch-{batch + 1}-process-{self._processes.rank}.npz"
            )
            arrays: dict[str, Any] = self._trainee.batch(self._epoch, batch)
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **arrays)
            advice = f"look at the batch with numpy.load('{path}'), or {advice}"
        kept = f"; the best epoch before it stays in {CHECKPOINTS}/{BEST}" if self._course.epochs else ""
        raise DivergedError(f"{self._trainee.name}: training diverged {place} ({what}); {advice}{kept}")

    def _is_told(self, epoch: int) -> bool:
        """Whether a line of the log is spent on an epoch, counted from 1; about ten of them are worth one."""
        return epoch % max(1, round(self._config.epochs / 10)) == 0

    def _end_epoch(self, values: Values) -> None:
        """Keeps the model if it is the best so far, and moves on."""
        course = self._course
        course.epochs.append(values)
        scores = {e: self._trainee.score(epoch) for e, epoch in enumerate(course.epochs)}
        known = {e: score for e, score in scores.items() if score is not None}
        last = len(scores) - 1
        course.best = min(known, key=lambda e: (known[e], e)) if known else last
        self._batch, self._done, self._sums = 0, 0.0, self._zeros()
        if course.best == last:
            self._checkpoints.save(BEST, {"model": self._trainee.model.state_dict()})
        self._trackers.log(
            {_tag(name): value for name, value in values.items() if value is not None},
            int(self._epoch * self._trainee.epoch_size),
        )
        self._trackers.flush()
        if self._config.keep_epochs and self._epoch:
            self._save(epoch_name(self._epoch))
            for name in self._checkpoints.epochs()[self._config.keep_epochs :]:
                self._checkpoints.remove(name)
        self._save(LAST)

    def _zeros(self) -> Tensor:
        return torch.zeros(2, len(self._trainee.losses), dtype=torch.float64, device=self._processes.device)

    def _means(self, sums_2K: Tensor) -> dict[str, float]:
        sums, counts = sums_2K.tolist()
        return {n: s / max(c, 1) for n, s, c in zip(self._trainee.losses, sums, counts, strict=True)}

    def _save(self, name: str) -> None:
        own = {"sums": self._sums.tolist(), "random": random_state()}
        processes: list[Any] = [own] * self._processes.world_size
        dist.all_gather_object(processes, own)
        if not all(math.isfinite(x) for other in processes for sums in other["sums"] for x in sums):
            self._fail("a loss is not finite", self._batch - 1)  # rather than keep weights that came of it
        place = {
            "batch": self._batch,
            "done": self._done,
            "processes": processes,
            "course": asdict(self._course),
        }
        trainee = self._trainee
        state = {"model": trainee.model.state_dict(), "optimizer": trainee.optimizer.state_dict()}
        # as text: checkpoints would take a list apart
        self._checkpoints.save(name, state | {"place": json.dumps(place)})
        self._saved_at = time.monotonic()

    def _resume(self) -> bool:
        """Takes the newest state that is whole, if there is any."""
        names = [name for name in (LAST, *self._checkpoints.epochs()) if self._checkpoints.has(name)]
        for name, older in zip_longest(names, names[1:]):
            try:
                self._take(name)
            except SidrecError:
                if older is None:
                    raise
                if self._processes.is_main:
                    warn(f"{self._folder / CHECKPOINTS / name}: a broken checkpoint; the run goes on from '{older}'")
            else:
                return True
        return False

    def _take(self, name: str) -> None:
        trainee = self._trainee
        optimizer = trainee.optimizer.state_to_load()
        state: dict[str, Any] = {"model": trainee.model.state_dict(), "optimizer": optimizer, "place": ""}
        self._checkpoints.load(name, state)
        trainee.model.load_state_dict(state["model"])
        trainee.optimizer.load_state_dict(state["optimizer"])
        place = json.loads(state["place"])
        self._batch, self._done, self._course = place["batch"], place["done"], Course(**place["course"])
        sums_P2K = torch.tensor([process["sums"] for process in place["processes"]], dtype=torch.float64).to(self._sums)
        if len(sums_P2K) == self._processes.world_size:
            self._sums = sums_P2K[self._processes.rank]
            set_random_state(place["processes"][self._processes.rank]["random"])
        elif self._processes.is_main:
            self._sums = sums_P2K.sum(0)


def _tag(name: str) -> str:
    """What trackers call a value of an epoch."""
    return f"epoch/{name.removeprefix(_TRAIN)}" if name.startswith(_TRAIN) else f"validation/{name}"
