"""Live progress of a job: a bar on a terminal, a line per stage in a log; silent on all processes but the main one."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sidrec_torchrec.output import Amount, output, quiet, rank, say

__all__ = ["Stage", "quiet", "say", "stage"]

_EVERY = 10.0  # seconds between two lines of a stage, where a log has them


class Stage:
    """One bar, such as an epoch. Made by ``stage``."""

    def __init__(self, update: Callable[[float, str, Mapping[str, float]], None] | None = None) -> None:
        self._update = update
        self._then: Callable[[], None] | None = None
        self.done = 0.0
        self.note = ""
        self.numbers: Mapping[str, float] = {}

    def advance(self, steps: float = 1, note: str | None = None, numbers: Mapping[str, float] | None = None) -> None:
        """Moves on by ``steps``; ``note`` is shown behind the bar (say, the loss), ``numbers`` are for JSON."""
        self.done += steps
        self.note = self.note if note is None else note
        self.numbers = self.numbers if numbers is None else numbers
        if self._update is not None:
            self._update(self.done, self.note, self.numbers)
        if self._then is not None:
            self._then()

    def followed_by(self, then: Callable[[], None]) -> "Stage":
        """Itself, calling ``then`` whenever it has moved on."""
        self._then = then
        return self


@contextmanager
def stage(title: str, total: float | None, *, show: bool, line: bool = True) -> Iterator[Stage]:
    """Shows progress over ``total`` steps (None if unknown) while the block runs; then one line with note and seconds.

    In a log that is JSON, or where more is asked for than usual, long stages also leave a line every ten seconds.

    Args:
        title: what is done.
        total: steps.
        show: False on all processes but the main one.
        line: whether the line stays; of hundreds of epochs, few are worth one.
    """
    start, how = time.monotonic(), output()
    if not show or how.amount is Amount.QUIET or rank() != 0:
        yield Stage()
        return
    if sys.stderr.isatty() and not how.is_json:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            current = Stage(partial(_show, bar, bar.add_task(title, total=total, note="")))
            yield current
    else:
        tells = how.is_json or how.amount is Amount.VERBOSE
        current = Stage(_Lines(title, total).update if tells else None)
        yield current
    if line or how.is_json or how.amount is Amount.VERBOSE:
        seconds = time.monotonic() - start
        numbers = {**current.numbers, "seconds": round(seconds, 3)}
        say(f"{title}: {current.note} ({seconds:.0f} s)", step=current.done, numbers=numbers)


def _show(bar: Progress, task: object, done: float, note: str, _: Mapping[str, float]) -> None:
    bar.update(task, completed=done, note=note)  # type: ignore[arg-type]


class _Lines:
    """How far a stage is, now and then."""

    def __init__(self, title: str, total: float | None) -> None:
        self._title = title
        self._total = "" if total is None else f" of {total:,.0f}"
        self._last = time.monotonic()

    def update(self, done: float, note: str, numbers: Mapping[str, float]) -> None:
        if time.monotonic() - self._last < _EVERY:
            return
        self._last = time.monotonic()
        say(f"{self._title}: {done:,.0f}{self._total} {note}".rstrip(), step=done, numbers=numbers)
