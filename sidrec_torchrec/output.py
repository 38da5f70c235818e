"""What a command says: its result on standard output; all else on standard error, as lines for people, or a JSON object per line."""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from enum import IntEnum
from typing import Any

from sidrec_torchrec.storage.urls import as_urls


class Amount(IntEnum):
    """How much is said."""

    QUIET = 0  # warnings and errors
    NORMAL = 1
    VERBOSE = 2


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command speaks.

    Args:
        job: its name, for JSON.
        is_json: whether lines are JSON objects: ``time`` (UTC), ``level``, ``rank``, ``job``, ``message``; where they are known
            also ``step`` and ``numbers``, by name.
        amount: how much it says.
    """

    job: str = ""
    is_json: bool = False
    amount: Amount = Amount.NORMAL


_output: ContextVar[Output] = ContextVar("output", default=Output())  # noqa: B039 - it is frozen


def output() -> Output:
    """How this process speaks now."""
    return _output.get()


@contextmanager
def speaking(how: Output) -> Iterator[None]:
    """Speaks so while the block runs."""
    token = _output.set(how)
    show = warnings.showwarning
    if how.is_json:
        warnings.showwarning = _show_warning
    try:
        yield
    finally:
        warnings.showwarning = show
        _output.reset(token)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing but warnings and errors is said while the block runs: for jobs called from Python, in a notebook say."""
    with speaking(replace(output(), amount=Amount.QUIET)):
        yield


def say(text: str, *, step: float | None = None, numbers: Mapping[str, float | None] | None = None) -> None:
    """A line on what a job does, from the first process, whoever calls it.

    Args:
        text: for people.
        step: how far the job is, for JSON alone; so are
        numbers: by name.
    """
    if output().amount >= Amount.NORMAL and rank() == 0:
        _write(text, "info", step, numbers)


def warn(text: str) -> None:
    """What may make a result other than what is wanted; said even where nothing else is, by the first process."""
    if rank() == 0:
        _write(text if output().is_json else f"warning: {text}", "warning")


def say_error(text: str) -> None:
    """What ended a command."""
    _write(text if output().is_json else f"error: {text}", "error")


def show(text: str) -> None:
    """A command's result, on standard output, from whichever process calls it."""
    print(as_urls(text), flush=True)


def rank() -> int:
    """Of this process, as torchrun numbers them."""
    return int(os.environ.get("RANK", "0"))


def _write(text: str, level: str, step: float | None = None, numbers: Mapping[str, Any] | None = None) -> None:
    how, text = output(), as_urls(text)
    if how.is_json:
        line: dict[str, Any] = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        line |= {"level": level, "rank": rank(), "job": how.job, "message": text}
        line |= {} if step is None else {"step": step}
        line |= {"numbers": dict(numbers)} if numbers else {}
        text = json.dumps(line)
    print(text, file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    _write(f"{category.__name__}: {message}", "warning")
