"""The server's addresses: ``/score``, and what tells how it is."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.server.batcher import Batcher
from sidrec_torchrec.server.limits import Limits, Refused
from sidrec_torchrec.server.metrics import Metrics
from sidrec_torchrec.server.reading import Asked, RequestReader, together
from sidrec_torchrec.server.schema import ScoreRequest

_LOG = logging.getLogger(__name__)
_GONE = 499  # the client went away; nobody reads this but the metrics
_READERS = 2  # threads that read JSON


class Service:
    """Answers requests by one ranker.

    Args:
        scorer: the ranker.
        reader: of its requests.
        limits: beyond which requests are refused.
        parallel: calls of the ranker at the same time.

    Attributes:
        pending: requests in hand.
        given_up: requests whose answer was cancelled, as the server was to end.
    """

    def __init__(self, scorer: Scorer, reader: RequestReader, limits: Limits, parallel: int) -> None:
        self.metadata = scorer.metadata
        self.metrics = Metrics()
        self.pending = self.given_up = 0
        self._scorer, self._reader, self._limits = scorer, reader, limits
        self._batcher = Batcher(self._score, limits, self.metrics, parallel)
        self._threads = ThreadPoolExecutor(_READERS, "read")
        self.metrics.gauges["sidrec_pending"] = ("Requests in hand.", lambda: self.pending)
        self.metrics.gauges["sidrec_queue_length"] = ("Requests that wait.", lambda: self._batcher.num_waiting)

    async def answer(self, request: Request) -> Response:
        """The answer to a request to ``/score``, counted."""
        start = time.perf_counter()
        try:
            response = _json(200, {"probabilities": await self._probabilities(request)})
            self.metrics.request_seconds.add(time.perf_counter() - start)
        except Refused as refused:
            response = _error(refused.status, str(refused))
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        except Exception:  # noqa: BLE001  whatever it is, the client gets no traceback, and others their answers
            _LOG.exception("a request failed")
            response = _error(500, "the server failed; its log says why")
        self.metrics.requests[response.status_code] += 1
        return response

    def close(self) -> None:
        """Ends its threads."""
        self._threads.shutdown()
        self._batcher.close()

    async def _probabilities(self, request: Request) -> dict[str, list[float]]:
        """By task, of each candidate."""
        if self.pending >= self._limits.pending:
            raise Refused(503, f"{self.pending} requests are in hand, more are not taken; ask again later")
        self.pending += 1
        try:
            body = await self._body(request)
            asked = await asyncio.get_running_loop().run_in_executor(self._threads, self._reader, body)
            probability_MK = await self._batcher(asked)
        finally:
            self.pending -= 1
        columns = probability_MK.reshape(len(probability_MK), len(self.metadata["tasks"])).T
        return dict(zip(self.metadata["tasks"], columns.tolist(), strict=True))

    async def _body(self, request: Request) -> bytes:
        most = self._limits.body_bytes
        too_long = Refused(413, f"the body is too long, at most {most:,} bytes are taken")
        if int(request.headers.get("content-length", 0)) > most:  # the HTTP server has seen that it is a number
            raise too_long
        body = bytearray()

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > most:
                    raise too_long

        try:
            await asyncio.wait_for(read(), self._limits.body_seconds)
        except asyncio.TimeoutError:
            raise Refused(408, f"the body did not arrive in {self._limits.body_seconds:g} seconds") from None
        return bytes(body)

    def _score(self, asked: Sequence[Asked]) -> np.ndarray:
        return self._scorer(**together(asked, self.metadata["inputs"])).numpy()


def make_app(service: Service) -> FastAPI:
    """The application; it closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(HTTPException, lambda _, error: _error(error.status_code, error.detail.lower()))

    @app.post("/score")
    async def score(request: Request) -> Response:
        return await service.answer(request)

    @app.get("/healthz")
    async def healthz() -> Response:
        return _json(200, {"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/metadata")
    async def metadata() -> Response:
        return _json(200, service.metadata)

    @app.get("/schema")
    async def schema() -> Response:
        return _json(200, ScoreRequest.model_json_schema())

    return app


def _error(status: int, message: str) -> Response:
    headers = {"Retry-After": "1"} if status == 503 else {}
    return _json(status, {"error": message}, headers)


def _json(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(value), status, headers, "application/json")
