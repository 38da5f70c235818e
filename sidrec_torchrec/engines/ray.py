"""A Ray cluster: https://docs.ray.io. Its machines must see the folders that the work reads and writes by the same paths."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sidrec_torchrec.engines.base import Engine, Item, Result, leave_group
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
        free = ray.available_resources()
        self._most = {kind: int(free.get(kind, 0)) for kind in ("CPU", "GPU")}
        self._actors: dict[str, list[Any]] = {"CPU": [], "GPU": []}

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, on_gpus: bool = False) -> Iterator[Result]:
        """See ``Engine``."""
        actors = self._of("GPU" if on_gpus and self._most["GPU"] else "CPU", len(items))
        held = self._ray.put(work)  # once on each machine
        yield from self._results(actors, [held], items)

    def _of(self, kind: str, count: int) -> list[Any]:
        """So many actors, if there is room; those of GPUs take no cores of the others'."""
        actors, most = self._actors[kind], max(1, self._most[kind])
        resources = {"num_cpus": int(kind == "CPU"), "num_gpus": int(kind == "GPU")}
        actor = self._ray.remote(_Actor).options(**resources, max_restarts=_AGAIN, max_task_retries=_AGAIN)
        actors += [actor.remote() for _ in range(min(count, most) - len(actors))]
        return actors

    def _results(self, actors: list[Any], held: list[Any], items: Sequence[Item]) -> Iterator[Any]:
        """Each actor has a piece of work at hand, and the next goes to whichever is done; results wait for those before them."""
        todo, busy, done = deque(enumerate(items)), {}, {}
        free, next_one = deque(actors), 0
        while next_one < len(items):
            while free and todo and todo[0][0] <= next_one + _WAITING * len(actors):
                place, item = todo.popleft()
                one = free.popleft()
                busy[one.call.remote(held, item)] = place, one
            ready, _ = self._ray.wait(list(busy))
            for result in ready:
                place, one = busy.pop(result)
                done[place] = result
                free.append(one)
            while next_one in done:
                yield self._result(done.pop(next_one))
                next_one += 1

    def close(self) -> None:
        """Gives the actors back, and leaves the cluster."""
        for actor in (*self._actors["CPU"], *self._actors["GPU"]):
            self._ray.kill(actor)
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
    """Does pieces of work, one after the other; keeps the work, with what it has loaded."""

    def __init__(self) -> None:
        leave_group()
        self._held: Any = None
        self._work: Callable[[Any], Any] = lambda item: item

    def call(self, held: list[Any], item: Any) -> Any:
        """What the work gives for an item.

        Args:
            held: reference to the work, in a list, as Ray would fetch it for each item.
            item: the item.
        """
        if held[0] != self._held:
            import ray

            self._held, self._work = held[0], ray.get(held[0])
        return self._work(item)
