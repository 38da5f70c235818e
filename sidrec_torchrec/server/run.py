"""Runs the application on a port until a signal asks it to stop."""

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Iterator

import uvicorn

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.server.app import Service, make_app
from sidrec_torchrec.server.limits import Limits

_BACKLOG = 2048
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ours: uvicorn would end by them, not by exit code 0."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free.

    Raises:
        SidrecError: if the port is taken or the host is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SidrecError(f"cannot listen on {host}:{port}: {error}; name another with --host or --port") from None
    # An answer is written in two parts; the second must not wait 40 ms for the client's word that it has the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def run(service: Service, listener: socket.socket, limits: Limits) -> None:
    """Serves until SIGTERM or SIGINT; then takes nothing new, and answers what is in hand.

    Raises:
        SidrecError: if something in hand was not answered in ``limits.stop_seconds``.
    """
    asyncio.run(_serve(make_server(service, limits), listener))
    if service.given_up:
        raise SidrecError(
            f"{service.given_up} requests were not answered in {limits.stop_seconds:g} seconds, and given up"
        )


def make_server(service: Service, limits: Limits) -> uvicorn.Server:
    """What runs the application; it ends once its ``should_exit`` is set."""
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.stop_seconds),
    )
    return _Server(config)


async def _serve(server: uvicorn.Server, listener: socket.socket) -> None:
    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, _stop, server)
    host, port = listener.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    await server.serve(sockets=[listener])


def _stop(server: uvicorn.Server) -> None:
    server.should_exit = True
