"""Scores requests that wait, together, in threads of its own."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from sidrec_torchrec.server.limits import Limits
from sidrec_torchrec.server.metrics import Metrics
from sidrec_torchrec.server.reading import Asked

Score = Callable[[Sequence[Asked]], np.ndarray]
_Waiting = tuple[Asked, asyncio.Future[np.ndarray]]


class Batcher:
    """Takes requests in turn. One that finds a thread idle is scored at once; those that come meanwhile wait, and are scored
    together when one is. For the thread of the event loop.

    Args:
        score: probabilities [M, ...] of the candidates of some requests, one request after another.
        limits: of a batch.
        metrics: that count the batches.
        parallel: calls of ``score`` at the same time.
    """

    def __init__(self, score: Score, limits: Limits, metrics: Metrics, parallel: int) -> None:
        self._score, self._limits, self._metrics = score, limits, metrics
        self._waiting: deque[_Waiting] = deque()
        self._idle = parallel
        self._threads = ThreadPoolExecutor(parallel, "score")

    @property
    def num_waiting(self) -> int:
        """Requests that no call has taken yet."""
        return len(self._waiting)

    async def __call__(self, asked: Asked) -> np.ndarray:
        """The probabilities of one request's candidates, [M, ...]; raises what ``score`` does."""
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((asked, future))
        self._start()
        return await future

    def close(self) -> None:
        """Ends the threads, once they have nothing to do."""
        self._threads.shutdown()

    def _start(self) -> None:
        """Gives idle threads what waits."""
        while self._idle and self._waiting:
            self._idle -= 1
            batch = self._take()
            call = asyncio.get_running_loop().run_in_executor(self._threads, self._run, [asked for asked, _ in batch])
            call.add_done_callback(partial(self._finish, batch))

    def _take(self) -> list[_Waiting]:
        batch, events, candidates = [self._waiting.popleft()], 0, 0
        events, candidates = batch[0][0].num_events_sent, batch[0][0].num_candidates
        while self._waiting:
            asked = self._waiting[0][0]
            events, candidates = events + asked.num_events_sent, candidates + asked.num_candidates
            if events > self._limits.batch_events or candidates > self._limits.batch_candidates:
                break
            batch.append(self._waiting.popleft())
        return batch

    def _run(self, asked: list[Asked]) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        return self._score(asked), time.perf_counter() - start

    def _finish(self, batch: list[_Waiting], call: asyncio.Future[tuple[np.ndarray, float]]) -> None:
        self._idle += 1
        self._start()
        error = call.exception()
        if error is None:
            probability_M, seconds = call.result()
            self._metrics.call_seconds.add(seconds)
            self._metrics.batch_requests.add(len(batch))
            self._metrics.batch_candidates.add(len(probability_M))
        first = 0
        for asked, future in batch:
            last = first + asked.num_candidates
            if future.cancelled():
                pass
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(probability_M[first:last])
            first = last
