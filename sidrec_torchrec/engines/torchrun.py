"""The processes that torchrun started, each of which runs the whole job."""

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist

from sidrec_torchrec.engines.base import Engine, Item, Result


class TorchrunEngine(Engine):
    """The processes of the group, which all call ``map`` with the same items, and are all given all results."""

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, on_gpus: bool = False) -> Iterator[Result]:
        """See ``Engine``; they take an item each, and the next when all have done theirs."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        for first in range(0, len(items), world_size):
            own = items[first + rank : first + rank + 1]
            results: list[list[Result]] = [[] for _ in range(world_size)]
            dist.all_gather_object(results, [work(item) for item in own])
            for held in results:
                yield from held

    def for_little(self) -> Engine:
        """Itself: the processes are there."""
        return self
