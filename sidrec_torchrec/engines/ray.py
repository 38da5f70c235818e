"""A Ray cluster: https://docs.ray.io. Its machines must see the folders that the work reads and writes by the same paths."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sidrec_torchrec.engines.base import Engine, Item, Result
from sidrec_torchrec.errors import SidrecError, first_line

_WAITING = 2  # results for each actor that may wait for an earlier one
_AGAIN = 3  # times that an actor is started anew whose machine is gone, and its piece of work done again


class RayEngine(Engine):
    """Actors on the free cores or GPUs of the cluster that ``RAY_ADDRESS`` names, or that this machine is part of; else on one of this machine alone.

    Raises:
        SidrecError: if Ray is not installed, or the cluster does not answer.
    """

    def __init__(self) -> None:
        try:
            import ray  # type: ignore[import-not-found]  # an extra
        except ImportError as error:
            raise SidrecError(
                f"--engine ray needs Ray ({first_line(error)}): pip install 'sidrec-torchrec[ray]'"
            ) from error
        self._ray: Any = ray
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            try:
                ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
            except Exception as error:  # whatever its start may raise
                raise SidrecError(
                    f"Ray does not start: {first_line(error)}; see RAY_ADDRESS, and `ray status`"
                ) from error

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, on_gpus: bool = False) -> Iterator[Result]:
        """See ``Engine``."""
        if not items:
            return
        free = self._ray.available_resources()
        gpus = int(free.get("GPU", 0)) if on_gpus else 0
        actor = self._ray.remote(_Actor).options(
            num_cpus=1, num_gpus=int(gpus > 0), max_restarts=_AGAIN, max_task_retries=_AGAIN
        )
        held = self._ray.put(work)  # once on each machine
        actors = [actor.remote(held) for _ in range(max(1, min(len(items), gpus or int(free.get("CPU", 1)))))]
        try:
            yield from self._results(actors, items)
        finally:
            for one in actors:
                self._ray.kill(one)

    def _results(self, actors: list[Any], items: Sequence[Item]) -> Iterator[Any]:
        """Each actor has a piece of work at hand, and the next goes to whichever is done; results wait for those before them."""
        todo, busy, done = deque(enumerate(items)), {}, {}
        free, next_one = deque(actors), 0
        while next_one < len(items):
            while free and todo and todo[0][0] <= next_one + _WAITING * len(actors):
                place, item = todo.popleft()
                one = free.popleft()
                busy[one.call.remote(item)] = place, one
            ready, _ = self._ray.wait(list(busy))
            for result in ready:
                place, one = busy.pop(result)
                done[place] = result
                free.append(one)
            while next_one in done:
                yield self._result(done.pop(next_one))
                next_one += 1

    def close(self) -> None:
        """Leaves the cluster."""
        if self._is_ours:
            self._ray.shutdown()

    def _result(self, result: Any) -> Any:
        try:
            return self._ray.get(result)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            raise SidrecError(
                f"a process of the Ray cluster is gone: {first_line(error)}; run again, maybe with more memory"
            ) from error


class _Actor:
    """Holds the work, with what it has loaded."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work

    def call(self, item: Any) -> Any:
        """What it gives for an item."""
        return self._work(item)
