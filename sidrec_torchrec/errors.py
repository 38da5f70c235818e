"""Errors a user can act on. The command line prints their message alone, without a traceback."""

import math
import re
from typing import Any

from sidrec_torchrec.storage.urls import as_urls

_NO_MEMORY = re.compile(
    "can't allocate memory|out of memory|not enough memory|Storage size calculation overflowed", re.IGNORECASE
)  # torch says so


class SidrecError(Exception):
    """Base of every error whose message names the cause and what to do.

    Attributes:
        exit_code: of a command that ends with it; docs/torchx.md lists them.
    """

    exit_code = 2

    def __str__(self) -> str:
        return as_urls(super().__str__())  # URLs, and not where their files are kept here


class DataError(SidrecError, ValueError):
    """Bad input data; the message names file, column and row (or key)."""


class CodecMismatchError(SidrecError, ValueError):
    """SIDs of one codec met another codec."""


class RunMismatchError(SidrecError, ValueError):
    """An output folder holds the results of another run."""


class FolderBusyError(SidrecError):
    """Another process is working in an output folder."""


class DivergedError(SidrecError):
    """Training came to a number that is not finite. Running again would end the same way."""

    exit_code = 3


class LostPeerError(SidrecError):
    """Another process of the job has ended, or does not answer."""

    exit_code = 4


class PreemptedError(SidrecError):
    """A signal asked the job to stop. Its state is kept; run again, and it goes on.

    Args:
        message: what was kept.
        signal: which; the exit code is 128 more, as shells have it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class StorageError(SidrecError):
    """The store that a URL is in cannot be reached, or refuses."""


class OutOfMemoryError(SidrecError):
    """There is less memory than was asked for."""


def out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """An error of Python, numpy, Arrow or torch, in our words, if it says that memory is short; else None."""
    text = first_line(error)
    if not isinstance(error, MemoryError) and not _NO_MEMORY.search(text):
        return None
    return OutOfMemoryError(f"not enough memory ({text}); smaller sizes or batches, or more processes, need less")


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type's name if it says nothing. Torch's and Arrow's go on for a page."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raises ValueError unless each of the config's fields ``names`` is ``least`` or more, and finite."""
    for name in names:
        value = getattr(config, name)
        if not value >= least:  # so that NaN is refused too
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")


def check_once(config: Any, *names: str) -> None:
    """Raises ValueError if one of the config's fields ``names``, each a tuple of names, holds one twice."""
    for name in names:
        values = getattr(config, name)
        if len(set(values)) != len(values):
            raise ValueError(f"name each {name} once, got '{','.join(values)}'")


def check_share(config: Any, *names: str) -> None:
    """Raises ValueError unless each of the config's fields ``names`` lies in [0, 1)."""
    for name in names:
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {getattr(config, name)}")
