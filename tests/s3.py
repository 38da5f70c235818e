"""A real S3 server on loopback, and mirrors of a test's own."""

import importlib.util
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sidrec_torchrec.storage import remote

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class S3:
    """A running server with a bucket.

    Args:
        port: on loopback.
        bucket: its name.
    """

    port: int
    bucket: str

    @property
    def url(self) -> str:
        """Of the bucket."""
        return f"s3://{self.bucket}"

    def ask(self, path: str, method: str = "GET") -> bytes:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        request.add_header("Content-Length", "0")
        return urllib.request.urlopen(request, timeout=30).read()

    def fails(self, rate: float, seed: int = 0) -> None:
        """From now on, so many of all requests fail."""
        self.ask(f"/__tell?rate={rate}&seed={seed}&denies=0")

    def denies(self) -> None:
        """From now on every request is forbidden."""
        self.ask("/__tell?rate=0&seed=0&denies=1")

    def log(self) -> list[dict[str, Any]]:
        """The requests since the last call."""
        return json.loads(self.ask("/__log"))


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    if any(importlib.util.find_spec(name) is None for name in ("moto", "flask", "flask_cors")):
        pytest.skip("no S3 server: pip install 'moto[s3]' flask flask-cors")
    file = tmp_path_factory.mktemp("s3") / "port"
    server = subprocess.Popen([sys.executable, "-m", "tests.s3_server", str(file)], cwd=ROOT)
    try:
        for _ in range(600):
            if file.exists() or server.poll() is not None:
                break
            time.sleep(0.1)
        yield int(file.read_text())
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def s3(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server with a new bucket, which ``s3://`` leads to; and mirrors under ``tmp_path``."""
    for name, value in aws_environment(s3_port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "mirrors"))
    server = S3(s3_port, f"bucket-{time.monotonic_ns()}")
    server.fails(0)
    server.ask(f"/{server.bucket}", "PUT")
    remote._store.cache_clear()
    yield server
    server.fails(0)


def aws_environment(port: int) -> dict[str, str]:
    """What leads ``s3://`` to a server on loopback, and nowhere else."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "an-access-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret-key",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "SIDREC_STORAGE_MINUTES": "2",
    }
