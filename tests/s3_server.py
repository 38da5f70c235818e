"""An S3 server on this machine, moto's, behind a gate that counts, refuses, and fails as it is told: ``python -m tests.s3_server PORT_FILE``.

The gate itself is told and asked over HTTP: ``/__tell?rate=0.5&seed=1&denies=0`` and ``/__log``.
"""

import json
import random
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>{}</Message></Error>"


class Gate:
    """A WSGI application before another.

    Of failing requests some are answered by an error, some not at all, before or after they are done, and some bodies end too soon.
    """

    def __init__(self, inner: Callable[..., Iterable[bytes]]) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._tell(rate="0", seed="0", denies="0")
        self._log: list[dict[str, Any]] = []

    def _tell(self, rate: str, seed: str, denies: str) -> None:
        self._rate, self._random, self._denies = float(rate), random.Random(int(seed)), denies == "1"

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith("/__"):
            with self._lock:
                content = b""
                if path == "/__tell":
                    self._tell(**dict(parse_qsl(environ["QUERY_STRING"])))
                else:
                    content, self._log = json.dumps(self._log).encode(), []
            start("200 OK", [("Content-Length", str(len(content)))])
            return [content]
        with self._lock:
            fails = self._random.random() < self._rate
            kind = self._random.choice(("500", "503", "dropped", "dropped when done", "cut")) if fails else ""
        size = int(environ.get("CONTENT_LENGTH") or 0)
        if kind == "dropped":
            return self._drop(environ, kind)
        if self._denies:
            return self._refuse(environ, start, "403 Forbidden", "AccessDenied")
        if kind in ("500", "503"):
            environ["wsgi.input"].read(size)
            names = {"500": ("500 Internal Server Error", "InternalError"), "503": ("503 Slow Down", "SlowDown")}
            return self._refuse(environ, start, *names[kind])
        answered: list[Any] = []
        body = b"".join(self._inner(environ, lambda status, headers, info=None: answered.extend((status, headers))))
        if kind == "dropped when done":
            return self._drop(environ, kind)
        status, headers = answered
        if kind == "cut" and environ["REQUEST_METHOD"] == "GET" and len(body) > 1:
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
            headers.append(("Content-Length", str(len(body))))
            body = body[: len(body) // 2]
        self._note(environ, status, len(body))
        start(status, headers)
        return [body]

    def _refuse(self, environ: dict[str, Any], start: Callable[..., Any], status: str, code: str) -> Iterable[bytes]:
        content = b"" if environ["REQUEST_METHOD"] == "HEAD" else _ERROR.format(code, code).encode()
        self._note(environ, status, 0)
        start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))])
        return [content]

    def _drop(self, environ: dict[str, Any], kind: str) -> Iterable[bytes]:
        self._note(environ, kind, 0)
        with suppress(OSError):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionResetError(kind)

    def _note(self, environ: dict[str, Any], status: str, size: int) -> None:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        said = {"method": method, "path": path, "query": environ["QUERY_STRING"], "status": status, "bytes": size}
        with self._lock:
            self._log.append(said)


def main(port_file: Path) -> None:
    """Serves until it is killed; writes its port, when it has one."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, Gate(DomainDispatcherApplication(create_backend_app)), threaded=True)
    new = port_file.with_suffix(".new")
    new.write_text(str(server.server_port))
    new.replace(port_file)
    server.serve_forever()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
