"""Distributed checkpoints in a run's folder: the last state, to go on from, and the best one, to keep."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from sidrec_torchrec.errors import SidrecError, first_line
from sidrec_torchrec.files import remove
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.storage.mirror import listed
from sidrec_torchrec.training.storage import (
    INDEX_FILE,
    JSONLoadPlanner,
    JSONSavePlanner,
    TensorFileReader,
    TensorFileWriter,
    remove_others,
)

BEST, LAST = "best", "last"  # the checkpoint to keep, and the one to go on from
_EPOCH = re.compile(r"epoch-(\d+)")
_BROKEN = "a broken checkpoint, or of another model"


def epoch_name(epoch: int) -> str:
    """Of the checkpoint that is kept of an epoch."""
    return f"epoch-{epoch}"


class Checkpoints:
    """Named checkpoints under one folder; each is whole or absent, even if the process dies while writing.

    Args:
        folder: where they are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, name: str) -> bool:
        """Whether there is a whole checkpoint ``name``."""
        return (self._folder / name / INDEX_FILE).exists()

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Replaces checkpoint ``name`` by ``state`` (tensors, sharded tensors, strings, numbers); on every process.

        Raises:
            SidrecError: if it cannot be written, say on a full disk; the one before stays.
        """
        folder = self._folder / name
        with _explained(
            f"{folder}: cannot be written", "run again where it can, and the run goes on from the one before"
        ):
            try:
                dcp.save(state, storage_writer=TensorFileWriter(folder), planner=JSONSavePlanner())
            except CheckpointException:  # all processes have it
                on_first_process(lambda: remove_others(folder))
                raise
        on_first_process(lambda: remove_others(folder))

    def epochs(self) -> list[str]:
        """Names of the checkpoints of epochs, the newest first."""
        found = [
            (int(known[1]), path.name) for path in listed(self._folder, "*") if (known := _EPOCH.fullmatch(path.name))
        ]
        return [name for _, name in sorted(found, reverse=True)]

    def remove(self, name: str) -> None:
        """Removes checkpoint ``name``, its index first; on every process."""

        def work() -> None:
            remove(self._folder / name / INDEX_FILE)
            remove(self._folder / name)

        on_first_process(work)

    def load(self, name: str, state: dict[str, Any]) -> None:
        """Fills ``state`` in place from checkpoint ``name``; on every process.

        Raises:
            SidrecError: if it is broken, or of another model.
        """
        path = self._folder / name
        self._index(name)  # torch would warn at length of what is wrong with it
        with _explained(f"{path}: {_BROKEN}", f"remove {self._folder} to train anew"):
            dcp.load(state, storage_reader=TensorFileReader(path), planner=JSONLoadPlanner())

    def names(self, name: str) -> set[str]:
        """Of all that checkpoint ``name`` holds, dotted; on every process.

        Raises:
            SidrecError: if it is broken.
        """
        return set(self.shapes(name))

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """By dotted name, the shape of each tensor that checkpoint ``name`` holds, whole; () of what is none.

        Raises:
            SidrecError: if it is broken.
        """
        kept = self._index(name).state_dict_metadata
        return {key: tuple(getattr(value, "size", ())) for key, value in kept.items()}

    def _index(self, name: str) -> Metadata:
        path = self._folder / name
        try:
            return TensorFileReader(path).read_metadata()
        except Exception as error:  # whatever a broken one may raise
            raise SidrecError(
                f"{path}: {_BROKEN} ({first_line(error)}); remove {self._folder} to train anew"
            ) from error


@contextmanager
def _explained(what: str, advice: str) -> Iterator[None]:
    """Says in one line what torch, in an exception that is no ``Exception``, says in the tracebacks of all processes."""
    try:
        yield
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        raise SidrecError(f"{what} ({first_line(first)}); {advice}") from error
