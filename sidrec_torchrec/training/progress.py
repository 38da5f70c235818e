"""Live progress of a job: a bar on a terminal, a line per stage in a log; silent on all processes but the main one."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_is_quiet: ContextVar[bool] = ContextVar("is_quiet", default=False)


class Stage:
    """One bar, such as an epoch. Made by ``stage``."""

    def __init__(self, update: Callable[..., None] | None = None) -> None:
        self._update = update
        self._then: Callable[[], None] | None = None
        self.note = ""

    def advance(self, steps: float = 1, note: str | None = None) -> None:
        """Moves on by ``steps``; ``note`` is shown behind the bar (say, the loss)."""
        self.note = self.note if note is None else note
        if self._update is not None:
            self._update(advance=steps, note=self.note)
        if self._then is not None:
            self._then()

    def followed_by(self, then: Callable[[], None]) -> "Stage":
        """Itself, calling ``then`` whenever it has moved on."""
        self._then = then
        return self


@contextmanager
def stage(title: str, total: float | None, *, show: bool, line: bool = True) -> Iterator[Stage]:
    """Shows progress over ``total`` steps (None if unknown) while the block runs; then one line with note and seconds.

    Args:
        title: what is done.
        total: steps.
        show: False on all processes but the main one.
        line: whether the line stays; of hundreds of epochs, few are worth one.
    """
    start = time.monotonic()
    if not show or _is_quiet.get():
        yield Stage()
        return
    console = Console(stderr=True)
    if not sys.stderr.isatty():
        current = Stage()
        yield current
    else:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
        with Progress(*columns, console=console, transient=True) as bar:
            current = Stage(partial(bar.update, bar.add_task(title, total=total, note="")))
            yield current
    if line:
        console.print(
            f"{title}: {current.note} ({time.monotonic() - start:.0f} s)", highlight=False, markup=False, soft_wrap=True
        )


def say(text: str) -> None:
    """A line on what a job does, where progress is shown; call on the main process."""
    if not _is_quiet.get():
        Console(stderr=True).print(text, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def quiet() -> Iterator[None]:
    """No stage is shown while the block runs: for jobs called from Python, in a notebook say, where lines add up."""
    token = _is_quiet.set(True)
    try:
        yield
    finally:
        _is_quiet.reset(token)
