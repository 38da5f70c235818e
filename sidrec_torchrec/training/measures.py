"""What is seen of training beside its losses, in TensorBoard and in JSON lines: gradients, rates, waiting, memory, skew."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from sidrec_torchrec.training.group import Processes

Item = TypeVar("Item")

EVERY = 10  # batches between two looks: what a look costs does not show beside ten batches
_GIB = 2.0**30


class Waits:
    """How long training waited for data.

    Attributes:
        seconds: in all.
        idle: of them, seconds in which this thread computed nothing itself: workers or disks did.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.idle = 0.0

    def timed(self, source: Iterable[Item]) -> Iterator[Item]:
        """The same, with the time that each takes to come added up."""
        iterator = iter(source)
        while True:
            start, busy = time.perf_counter(), time.thread_time()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                seconds = time.perf_counter() - start
                self.seconds += seconds
                self.idle += max(seconds - (time.thread_time() - busy), 0.0)
            yield item


class Measured(Protocol):
    """What is asked of an optimizer."""

    def measures(self) -> dict[str, float]:
        """The norm of the gradients of the last step, and the rates, by name."""


class Measures:
    """Looks at training every few batches; every process calls it as often as the others.

    Args:
        optimizer: of the trainee.
        waits: for its data.
        processes: the group.
    """

    def __init__(self, optimizer: Measured, waits: Waits, processes: Processes) -> None:
        self._optimizer = optimizer
        self._waits = waits
        self._processes = processes
        self._batches = 0
        self._began = _clocks(waits)
        self._ended = self._began
        self._shared: tuple[list[torch.Tensor], dist.Work] | None = None

    def begin(self) -> None:
        """Before the batches of an epoch: what was between two epochs is nobody's waiting."""
        now = _clocks(self._waits)
        self._began = tuple(n - (e - b) for n, e, b in zip(now, self._ended, self._began, strict=True))

    def end(self) -> None:
        """After the batches of an epoch."""
        self._ended = _clocks(self._waits)

    def after_step(self) -> dict[str, float] | None:
        """After each batch; every ``EVERY`` batches what was seen, by TensorBoard's tag, else None.

        ``train/data_wait`` is the share of the time in which training waited for data. ``train/rank_skew``, of several
        processes, is what the slowest needed by what they needed on the mean, without waiting for each other; it is that of
        the look before, so that nobody waits for it.
        """
        self._batches += 1
        if self._batches % EVERY:
            return None
        now = _clocks(self._waits)
        wall, waited, own = (after - before for after, before in zip(now, self._began, strict=True))
        self._began = now
        seen = {f"train/{name}": value for name, value in self._optimizer.measures().items()}
        seen["train/data_wait"] = waited / max(wall, 1e-9)
        seen |= self._skew(own)
        return seen | _memory(self._processes.device)

    def _skew(self, own: float) -> dict[str, float]:
        if self._processes.world_size == 1:
            return {}
        skew = {}
        if self._shared is not None:
            gathered, work = self._shared
            work.wait()
            seconds_P = torch.stack(gathered)
            skew = {"train/rank_skew": float(seconds_P.max() / seconds_P.mean().clamp_min(1e-9))}
        gathered = [torch.zeros((), dtype=torch.float64) for _ in range(self._processes.world_size)]
        mine = torch.tensor(own, dtype=torch.float64)  # on the CPU, whatever computes
        work = dist.all_gather(gathered, mine, async_op=True)
        assert work is not None
        self._shared = gathered, work
        return skew


def _clocks(waits: Waits) -> tuple[float, ...]:
    """Seconds that have passed, that were waited for data, and that this process needed itself, on data or computing."""
    return time.perf_counter(), waits.seconds, time.thread_time() + waits.idle


def _memory(device: torch.device) -> dict[str, float]:
    """What this process holds, in GiB."""
    held = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        held["memory/rss_gib"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / _GIB
    if device.type == "cuda":
        held["memory/cuda_gib"] = torch.cuda.max_memory_allocated(device) / _GIB
    return held
