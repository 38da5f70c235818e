"""A Ray cluster: https://docs.ray.io. Its machines must see the folders that the work reads and writes by the same paths."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sidrec_torchrec.engines.base import Engine, Item, Result
from sidrec_torchrec.errors import SidrecError, first_line

_WAITING = 2  # pieces of work for each core, that none is ever idle


class RayEngine(Engine):
    """Tasks on the cluster that ``RAY_ADDRESS`` names, or that this machine is part of; else on one of this machine alone.

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

    def map(self, work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """See ``Engine``."""
        held = self._ray.put(work)  # once on each machine, shared by its processes
        task = self._ray.remote(_call)
        waiting: deque[Any] = deque()
        most = max(1, int(_WAITING * self._ray.cluster_resources().get("CPU", 1)))
        try:
            for item in items:
                waiting.append(task.remote(held, item))
                if len(waiting) >= most:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for other in waiting:
                self._ray.cancel(other)

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


def _call(work: Callable[[Item], Result], item: Item) -> Result:
    return work(item)
