"""All cores of this machine."""

import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from sidrec_torchrec.engines.base import Engine, Item, Result, leave_group
from sidrec_torchrec.errors import SidrecError

_SECONDS = 10  # that a process has to remove what it had begun


class LocalEngine(Engine):
    """Processes of this machine, one a core, or a GPU; started when there is work for two.

    A script that uses it without the command line needs Python's guard, ``if __name__ == "__main__":``, as its processes
    import the script.

    Args:
        cores: processes; None for as many as there are cores for this one.
    """

    def __init__(self, cores: int | None = None) -> None:
        self._cores = cores or len(os.sched_getaffinity(0))
        self._pool: ProcessPoolExecutor | None = None
        self._places = 0  # for how many processes the pool is
        self._calls = 0  # of map

    def map(self, work: Callable[[Item], Result], items: Sequence[Item], *, on_gpus: bool = False) -> Iterator[Result]:
        """See ``Engine``."""
        gpus = torch.cuda.device_count() if on_gpus else 0
        places = gpus or self._cores
        if places == 1 or len(items) <= 1:
            yield from map(work, items)
            return
        with tempfile.TemporaryFile() as file:  # without a name: nothing is left of it, however this process ends
            pickle.dump(work, file, protocol=pickle.HIGHEST_PROTOCOL)
            file.flush()
            self._calls += 1
            path = Path(f"/proc/{os.getpid()}/fd/{file.fileno()}")
            yield from self._results(self._of(places, is_gpu=bool(gpus)), (self._calls, path), items)

    def _of(self, places: int, *, is_gpu: bool) -> ProcessPoolExecutor:
        """Processes for so many places."""
        if self._pool is None or self._places != places:
            self.close()
            # forked processes would have this one's locks, but not the threads that hold them
            spawn = multiprocessing.get_context("spawn")
            numbers = spawn.SimpleQueue()
            for number in range(places):
                numbers.put(number if is_gpu else None)
            self._pool = ProcessPoolExecutor(places, mp_context=spawn, initializer=_start, initargs=(numbers,))
            self._places = places
        return self._pool

    def _results(self, pool: ProcessPoolExecutor, work: tuple[int, Path], items: Sequence[Item]) -> Iterator[Any]:
        waiting: deque[Future[Any]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_work_on, work, item))
                if len(waiting) > 2 * self._places:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            self._pool = None
            raise SidrecError(
                "a process that worked on a part is gone; if the machine ran out of memory, give it fewer cores (taskset), or more memory"
            ) from error
        except BaseException:
            self._give_up(pool)
            raise

    def _give_up(self, pool: ProcessPoolExecutor) -> None:
        """Ends the processes in the middle of their work, which may be minutes from done, and that they have been handed already."""
        self._pool = None
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            if process.pid is not None:  # it has been started
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGINT)
        for process in processes:
            process.join(_SECONDS)
            process.kill()

    def close(self) -> None:
        """See ``Engine``."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _work_on(work: tuple[int, Path], item: Any) -> Any:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _load(*work)(item)
    except KeyboardInterrupt:  # what it had begun has been removed
        _leave()
    finally:
        signal.signal(signal.SIGINT, _leave)


@lru_cache(maxsize=1)
def _load(call: int, path: Path) -> Callable[[Any], Any]:
    """The work of a call of ``map``, which wrote the file a moment ago. The path may be that of an earlier call's, too."""
    with path.open("rb") as file:
        return pickle.load(file)  # noqa: S301 (of our own parent, whose file has no name)


def _start(gpus: Any) -> None:
    """A process's first steps: it takes a GPU, if it is to have one, and one thread, as the others have the other cores."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, _leave)  # of a terminal's Ctrl-C, that all processes get, the parent speaks alone
    leave_group()
    gpu = gpus.get()
    if gpu is not None:
        os.environ["LOCAL_RANK"] = str(gpu)
        torch.cuda.set_device(gpu)
    torch.set_num_threads(1)


def _leave(*_: Any) -> NoReturn:
    os._exit(128 + signal.SIGINT)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its processes so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
