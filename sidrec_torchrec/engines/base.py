"""An engine maps a function over pieces of work that know nothing of each other."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.registry import Registry

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(ABC):
    """Runs pieces of work somewhere, until it is closed."""

    @abstractmethod
    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, on_gpus: bool = False) -> Iterator[Result]:
        """What ``work`` gives for each item, in the order of the items; few of them wait to be taken.

        Args:
            work: can be pickled; it reaches each process once and stays there, so it may hold what all items need, and what
                it loads for the first of them.
            items: small, can be pickled.
            on_gpus: whether it is quicker on a GPU: where there are any, each process has one, which is torch's current one;
                else each has a core.

        Raises:
            Exception: what ``work`` raised for the first item that failed; the others are given up.
            SidrecError: if a process that worked is gone.
        """

    def for_little(self) -> "Engine":
        """What does work that is done before other processes have started: this one."""
        return Inline()

    def close(self) -> None:
        """Ends its processes."""


class Inline(Engine):
    """This process, one item after another."""

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, on_gpus: bool = False) -> Iterator[Result]:
        """See ``Engine``."""
        return map(work, items)


ENGINES: Registry[Callable[[], Engine]] = Registry(
    "engine",
    late={"local": "sidrec_torchrec.engines.local:LocalEngine", "ray": "sidrec_torchrec.engines.ray:RayEngine"},
)


def leave_group() -> None:
    """For a process that an engine started: it is no part of the group of torchrun's whose variables it has inherited."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)


def check_engine(name: str | None) -> None:
    """Refuses an engine that there is not, and any under torchrun, whose processes share the work.

    Raises:
        SidrecError: as above.
    """
    if name is None:
        return
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise SidrecError(
            f"--engine {name} under torchrun, which started {dist.get_world_size()} processes to do the work: leave out one of the two"
        )
    ENGINES[name]


def open_engine(name: str | None) -> Engine:
    """What does a job's work: torchrun's processes, if they are several, else the engine of that name, ``local`` if None.

    Raises:
        SidrecError: as ``check_engine``, or if the engine does not start.
    """
    check_engine(name)
    if dist.is_initialized() and dist.get_world_size() > 1:
        from sidrec_torchrec.engines.torchrun import TorchrunEngine

        return TorchrunEngine()
    return ENGINES[name or "local"]()
