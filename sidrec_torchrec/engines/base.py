"""An engine maps a function over pieces of work that know nothing of each other."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from sidrec_torchrec.registry import Registry

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(ABC):
    """Runs pieces of work somewhere, until it is closed."""

    @abstractmethod
    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """What ``work`` gives for each item, in the order of the items; few of them wait to be taken.

        Args:
            work: can be pickled; it reaches each process once, so it may hold what all items need.
            items: small, can be pickled.

        Raises:
            Exception: what ``work`` raised for the first item that failed; the others are given up.
            SidrecError: if a process that worked is gone.
        """

    def close(self) -> None:
        """Ends its processes."""


class Inline(Engine):
    """This process, one item after another."""

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See ``Engine``."""
        return map(work, items)


ENGINES: Registry[Callable[[], Engine]] = Registry(
    "engine",
    late={"local": "sidrec_torchrec.engines.local:LocalEngine", "ray": "sidrec_torchrec.engines.ray:RayEngine"},
)
