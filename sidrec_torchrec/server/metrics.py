"""Counts of a server, in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Histogram:
    """How often a value was at most each of some bounds.

    Args:
        bounds: rising.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        """Counts a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str) -> Iterator[str]:
        """As Prometheus reads it."""
        below = 0
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            below += count
            yield f'{name}_bucket{{le="{bound}"}} {below}'
        yield f"{name}_sum {self._sum}"
        yield f"{name}_count {below}"


class Metrics:
    """What a server counts; for the thread of its event loop.

    Attributes:
        requests: answered, by status.
        request_seconds: from a request's headers to its answer, of those that were scored.
        call_seconds: of the scorer's calls.
        batch_requests, batch_candidates: of each call.
        gauges: what is looked at when metrics are asked for, by name: a help text and the value.
    """

    def __init__(self) -> None:
        self.requests: Counter[int] = Counter()
        self.request_seconds = Histogram(_SECONDS)
        self.call_seconds = Histogram(_SECONDS)
        self.batch_requests = Histogram(_SIZES)
        self.batch_candidates = Histogram(_SIZES)
        self.gauges: dict[str, tuple[str, Callable[[], int]]] = {}

    def text(self) -> str:
        """All of them."""
        return "\n".join([*self._lines(), ""])

    def _lines(self) -> Iterator[str]:
        yield from _head("sidrec_requests_total", "counter", "Requests to /score, by the status of their answer.")
        for status, count in sorted(self.requests.items()):
            yield f'sidrec_requests_total{{status="{status}"}} {count}'
        for name, text, histogram in (
            ("sidrec_request_seconds", "Time of scored requests, waiting included.", self.request_seconds),
            ("sidrec_call_seconds", "Time of calls of the ranker.", self.call_seconds),
            ("sidrec_batch_requests", "Requests of one call.", self.batch_requests),
            ("sidrec_batch_candidates", "Candidates of one call.", self.batch_candidates),
        ):
            yield from _head(name, "histogram", text)
            yield from histogram.lines(name)
        for name, (text, value) in self.gauges.items():
            yield from _head(name, "gauge", text)
            yield f"{name} {value()}"


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
