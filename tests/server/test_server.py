"""A real server on a free port: its answers are the scorer's, whatever waits together; what it refuses, sheds, counts and ends."""

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="the extra `server` is not installed")
pytest.importorskip("uvicorn", reason="the extra `server` is not installed")

from sidrec_torchrec import server as server_folder
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import serve
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import export
from sidrec_torchrec.server.app import Service
from sidrec_torchrec.server.limits import Limits
from sidrec_torchrec.server.reading import RequestReader
from sidrec_torchrec.server.run import listen, make_server
from tests.ranker.test_serving import USERS, make_inputs, make_model

SIZES = [([5], [3]), ([0], [2]), ([40], [1]), ([3], [0]), ([300], [17]), ([1], [1])]
COMMAND = """
import sys
from sidrec_torchrec.cli import main
code = main(sys.argv[1:])
assert "torchrec" not in sys.modules and "fbgemm_gpu" not in sys.modules
sys.exit(code)
"""


class Gate:
    """A scorer whose calls wait while it is shut; it notes how many requests each call has."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer, self.metadata = scorer, scorer.metadata
        self.open, self.entered, self.calls = threading.Event(), threading.Event(), []
        self.fails = False
        self.open.set()

    def __call__(self, **inputs: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(inputs["request_time_B"]))
        self.entered.set()
        assert self.open.wait(30)
        if self.fails:
            raise RuntimeError("out of luck")
        return self.scorer(**inputs)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def package(model, tmp_path_factory):
    file = tmp_path_factory.mktemp("package") / "ranker.pt2"
    write(export(model), describe(model.sids, USERS), file, compiled=False)
    return file


@pytest.fixture(scope="module")
def scorer(package) -> Scorer:
    return Scorer(package)


@pytest.fixture
def gate(scorer) -> Gate:
    return Gate(scorer)


@contextlib.contextmanager
def serving(gate: Gate, **limits) -> Iterator[int]:
    """A server in a thread; its port."""
    limits = Limits(**limits)
    listener = listen("127.0.0.1", 0)
    server = make_server(Service(gate, RequestReader(gate.metadata, [], limits), limits, 1), limits)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        gate.open.set()
        server.should_exit = True
        thread.join(30)
        listener.close()
    assert not thread.is_alive()


def ask(port: int, body: bytes | str, method: str = "POST", path: str = "/score", **headers: str):
    """Status, JSON or text, and headers of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        return answer.status, json.loads(text) if text.startswith("{") else text, answer.headers
    finally:
        connection.close()


def get(port: int, path: str):
    return ask(port, "", "GET", path)[1]


def make_request(model, events: list[int], candidates: list[int]) -> tuple[dict[str, torch.Tensor], bytes]:
    """A scorer's inputs of one request, and the same in JSON."""
    inputs = make_inputs(model, events, candidates)
    inputs["time_N"] = inputs["time_N"].sort().values
    users = zip(USERS.items(), inputs["user_BF"][0].tolist(), strict=True)
    request = {
        "time": int(inputs["request_time_B"]),
        "num_events": int(inputs["num_events_B"]),
        "history": {
            "words": inputs["history_NW"].tolist(),
            "labels": {"label": inputs["action_N"].tolist()},
            "time": inputs["time_N"].tolist(),
        },
        "candidates": {"words": inputs["candidate_MW"].tolist()},
        "user": {name: values[code - 1] if code else None for (name, values), code in users},
        "fingerprints": {"item": "some-codec"},
    }
    return inputs, json.dumps(request).encode()


def test_answers_are_the_scorer_s(model, scorer, gate):
    with serving(gate) as port:
        for sizes in SIZES:
            inputs, body = make_request(model, *sizes)
            status, answer, _ = ask(port, body)
            assert (status, answer) == (200, {"probabilities": {"label": scorer(**inputs).tolist()}})
        assert gate.calls == [1] * len(SIZES)
        assert get(port, "/healthz") == {"status": "ok"}
        assert get(port, "/metadata") == json.loads(json.dumps(scorer.metadata))
        assert get(port, "/schema")["required"] == ["time", "candidates"]


def test_what_waits_is_scored_together_and_each_gets_its_own(model, scorer, gate):
    requests = [make_request(model, *sizes) for sizes in SIZES]
    with serving(gate) as port, ThreadPoolExecutor(len(requests)) as pool:
        gate.open.clear()
        answers = [pool.submit(ask, port, requests[0][1])]
        assert gate.entered.wait(30)
        answers += [pool.submit(ask, port, body) for _, body in requests[1:]]
        until(lambda: value(port, "sidrec_queue_length") == len(requests) - 1)
        gate.open.set()
        for (inputs, _), answer in zip(requests, answers, strict=True):
            status, said, _ = answer.result(30)
            assert status == 200
            np.testing.assert_allclose(said["probabilities"]["label"], scorer(**inputs), rtol=0, atol=1e-6)
        assert gate.calls == [1, len(requests) - 1]
        assert value(port, "sidrec_batch_requests_count") == 2
        assert value(port, "sidrec_batch_candidates_sum") == sum(candidates for _, (candidates,) in SIZES)


@pytest.mark.parametrize(
    ("limits", "events", "candidates", "calls"),
    [
        ({"batch_candidates": 5}, [5] * 6, [1, 3, 2, 3, 2, 4], [1, 2, 2, 1]),
        ({"batch_events": 20}, [5, 5, 5, 5, 18, 2], [1] * 6, [1, 3, 2]),
        ({"batch_events": 20}, [5, 30, 1], [1] * 3, [1, 1, 1]),  # more than a batch holds goes alone
    ],
)
def test_batches_are_bounded(limits, events, candidates, calls, model, gate):
    sizes = [([N], [M]) for N, M in zip(events, candidates, strict=True)]
    with serving(gate, **limits) as port, ThreadPoolExecutor(len(sizes)) as pool:
        gate.open.clear()
        answers = []
        for number, size in enumerate(sizes):
            answers.append(pool.submit(ask, port, make_request(model, *size)[1]))
            until(lambda number=number: gate.entered.is_set() and value(port, "sidrec_queue_length") == number)
        gate.open.set()
        assert [answer.result(30)[0] for answer in answers] == [200] * len(sizes)
    assert gate.calls == calls


def test_refusals(model, gate):
    _, body = make_request(model, [5], [3])
    other = json.loads(body) | {"fingerprints": {"item": "another"}}
    with serving(gate, body_bytes=len(body), candidates=3, body_seconds=0.3) as port:
        assert ask(port, json.dumps(other))[:2] == (
            409,
            {"error": "fingerprints.item: these are SIDs of codec another, the ranker reads those of some-codec"},
        )
        too_long = (413, {"error": f"the body is too long, at most {len(body):,} bytes are taken"})
        assert ask(port, body + b" ")[:2] == too_long
        assert ask(port, iter([body, b" "]))[:2] == too_long  # in chunks, of an unknown length
        status, said, _ = ask(port, "{}")
        assert (status, said) == (422, {"error": "time: is missing"})
        assert ask(port, "", "GET")[0] == 405
        assert ask(port, "", "GET", "/elsewhere")[:2] == (404, {"error": "not found"})
        assert ask(port, body[:-9], **{"Content-Length": str(len(body))})[:2] == (
            408,
            {"error": "the body did not arrive in 0.3 seconds"},
        )
        assert ask(port, body)[0] == 200
        counts = {200: 1, 408: 1, 409: 1, 413: 2, 422: 1}
        assert {status: value(port, f'sidrec_requests_total{{status="{status}"}}') for status in counts} == counts


def test_beyond_a_bound_requests_are_shed(model, scorer, gate):
    inputs, body = make_request(model, [5], [3])
    with serving(gate, pending=2) as port, ThreadPoolExecutor(2) as pool:
        gate.open.clear()
        taken = [pool.submit(ask, port, body) for _ in range(2)]
        until(lambda: value(port, "sidrec_pending") == 2)
        for _ in range(3):
            status, said, headers = ask(port, body)
            assert status == 503 and headers["Retry-After"] == "1"
            assert said == {"error": "2 requests are in hand, more are not taken; ask again later"}
        gate.open.set()
        assert [answer.result(30)[0] for answer in taken] == [200, 200]
        assert ask(port, body)[1]["probabilities"]["label"] == scorer(**inputs).tolist()
        assert value(port, 'sidrec_requests_total{status="503"}') == 3


def test_a_failure_is_logged_not_told(model, gate, caplog):
    _, body = make_request(model, [5], [3])
    with serving(gate) as port:
        gate.fails = True
        assert ask(port, body)[:2] == (500, {"error": "the server failed; its log says why"})
        gate.fails = False
        assert ask(port, body)[0] == 200
    assert "out of luck" in caplog.text


def test_metrics_are_prometheus_text(model, gate):
    with serving(gate) as port:
        ask(port, make_request(model, [5], [3])[1])
        lines = get(port, "/metrics").splitlines()
    names = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(any(name.startswith(known) for known in names) for name in values)
    buckets = [int(count) for name, count in values.items() if name.startswith("sidrec_request_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == int(values["sidrec_request_seconds_count"]) == 1
    assert values['sidrec_batch_candidates_bucket{le="2"}'] == "0"
    assert values['sidrec_batch_candidates_bucket{le="4"}'] == "1"


def test_the_command_answers_what_it_has_taken_when_it_is_asked_to_stop(model, scorer, package):
    """SIGTERM comes in the middle of a request."""
    inputs, body = make_request(model, [40], [7])
    command = [sys.executable, "-c", COMMAND, "serve", "--package", package, "--port", "0", "--pending", "5"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as job:
        port = int(job.stdout.readline().rpartition(":")[2])
        np.testing.assert_allclose(ask(port, body)[1]["probabilities"]["label"], scorer(**inputs), rtol=0, atol=1e-6)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            connection.sendall(head + body[:50])
            until(lambda: value(port, "sidrec_pending") == 1)
            job.send_signal(signal.SIGTERM)
            until(lambda: is_refused(port))
            connection.sendall(body[50:])
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 200") and b'"probabilities"' in answer
        assert job.wait(30) == 0


def test_answers_do_not_wait_for_the_client_s_acknowledgement():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_what_cannot_be_served_is_said(package, tmp_path, monkeypatch):
    with listen("127.0.0.1", 0) as taken, pytest.raises(SidrecError, match=r"cannot listen on 127.0.0.1:\d+: .*in use"):
        serve.main(serve.ServeConfig(package=package, port=taken.getsockname()[1]))
    with pytest.raises(SidrecError, match="expected 00"):
        serve.main(serve.ServeConfig(package=package, sha256="00"))
    with pytest.raises(ValueError, match="port must lie in 0 to 65535"):
        serve.ServeConfig(package=package, port=70_000)
    with pytest.raises(ValueError, match="pending must be at least 1"):
        Limits(pending=0)
    monkeypatch.delitem(sys.modules, "sidrec_torchrec.server.app")
    monkeypatch.delattr(server_folder, "app")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SidrecError, match=r"needs fastapi: pip install 'sidrec-torchrec\[server\]'"):
        serve.main(serve.ServeConfig(package=package))


def value(port: int, name: str) -> float:
    """A figure of /metrics."""
    lines = get(port, "/metrics").splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


def is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return True
    return False


def until(is_so, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
