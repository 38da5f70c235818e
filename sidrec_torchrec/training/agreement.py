"""What the processes do between two steps: go on, save, or stop, the same on all of them; and the signals that ask to stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Wish(IntEnum):
    """What a process would have all of them do; of several wishes the greatest is followed."""

    GO_ON = 0
    SAVE = 1
    STOP = 2
    FAIL = 3


class Agreement:
    """Follows the greatest wish of all processes.

    With several processes a wish is followed a step later: it is shared while the next step is computed, so that sharing
    it costs no waiting.

    Args:
        world_size: number of processes; each calls ``next`` as often as the others.

    Attributes:
        lag: steps until ``next`` follows a wish.
    """

    def __init__(self, world_size: int) -> None:
        self.lag = int(world_size > 1)
        self._shared: tuple[torch.Tensor, dist.Work] | None = None

    def next(self, wish: Wish) -> Wish:
        """Takes this process's wish; gives what all do now."""
        if not self.lag:
            return wish
        agreed = self._settle()
        wish_1 = torch.tensor([wish])  # on the CPU, whatever computes: no kernel has to end for it
        self._shared = wish_1, dist.all_reduce(wish_1, dist.ReduceOp.MAX, async_op=True)
        return agreed

    def last(self, wish: Wish) -> Wish:
        """As ``next``, but what is wished now is followed now; waits for all processes."""
        return max(self.next(wish), self._settle())

    def _settle(self) -> Wish:
        if self._shared is None:
            return Wish.GO_ON
        wish_1, work = self._shared
        work.wait()
        self._shared = None
        return Wish(int(wish_1))


class Signals:
    """Whether this process was asked to stop. Made by ``catch_signals``."""

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None

    def _catch(self, number: int, _frame: object) -> None:
        self.caught = signal.Signals(number)


@contextmanager
def catch_signals() -> Iterator[Signals]:
    """SIGTERM, as sent before a pre-emption, and SIGHUP do not end the process while the block runs, but are kept.

    Signals that are ignored, say under ``nohup``, stay so. In a thread that is not the main one nothing is caught.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    caught = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for number in caught:
        signal.signal(number, signals._catch)
    try:
        yield signals
    finally:
        for number in caught:
            signal.signal(number, before[number])
