"""What a server takes at most, and how it says no."""

from dataclasses import dataclass

from sidrec_torchrec.errors import SidrecError, check_at_least


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the server takes at most.

    Args:
        body_bytes: of one request; more is answered 413.
        events: of one request's history; more is answered 422, as for candidates.
        candidates: of one request.
        pending: requests that are read, wait or are scored at the same time; those that come beyond are answered 503.
        batch_events: events that are scored in one call, of requests that waited; a request with more is scored alone.
        batch_candidates: candidates likewise.
        body_seconds: that a request's body may take to arrive; a slower one is answered 408.
        stop_seconds: that requests in hand may take after SIGTERM.
    """

    body_bytes: int = 4 << 20
    events: int = 10_000
    candidates: int = 1_000
    pending: int = 64
    batch_events: int = 20_000
    batch_candidates: int = 2_000
    body_seconds: float = 10.0
    stop_seconds: float = 30.0

    def __post_init__(self) -> None:
        check_at_least(self, 1, "body_bytes", "events", "candidates", "pending", "batch_events", "batch_candidates")
        check_at_least(self, 0.1, "body_seconds", "stop_seconds")


class Refused(SidrecError):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: one sentence for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
