"""``sidrec serve`` on loopback: answers per second and their times against what is asked, and what happens past saturation.

    python benchmarks/serve_load.py [--compiled] [--seconds 20] [--events 500] [--candidates 50] [--json FILE]

The server runs a ranker (SIDs of 25 trits, D = 64, H = 4) on one thread, and takes 64 requests in hand. Its capacity,
measured before each load, is what it answers to 32 clients, each of which asks again as soon as it is answered. Then requests
arrive at random (Poisson), at a share of that capacity, whether or not earlier ones have been answered; times are from when a
request was due. The clients have a process of their own, which takes processor time too.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from comparison import machine
from serving_latency import USERS, make, make_request

from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.serving import export

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
BODIES = 64  # different requests
PENDING = 64


@dataclass
class Seen:
    """Status and seconds of each answer, and for how long was asked."""

    answers: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> dict[str, float]:
        """Rates, and times of what was answered, in milliseconds."""
        times = [1000 * seconds for status, seconds in self.answers if status == 200] or [float("nan")]
        shed = sum(status == 503 for status, _ in self.answers)
        return {
            "offered_per_s": len(self.answers) / self.seconds,
            "answered_per_s": sum(status == 200 for status, _ in self.answers) / self.seconds,
            "shed": shed / max(len(self.answers), 1),
            "failed": sum(status not in (200, 503) for status, _ in self.answers),
            "p50_ms": float(np.quantile(times, 0.5)),
            "p99_ms": float(np.quantile(times, 0.99)),
        }


class Clients:
    """Connections to the server, as many as are needed at once.

    Args:
        port: of the server.
        bodies: that are asked in random order.
    """

    def __init__(self, port: int, bodies: list[bytes]) -> None:
        self._port = port
        head = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
        self._requests = [head.format(len(body)).encode() + body for body in bodies]
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, seen: Seen, due: float) -> None:
        """Sends one request, and notes its answer."""
        try:
            status = await self._answer(random.choice(self._requests))
        except (OSError, asyncio.IncompleteReadError):
            status = 0
        seen.answers.append((status, time.perf_counter() - due))

    async def _answer(self, request: bytes) -> int:
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        (length,) = re.findall(r"content-length: (\d+)", head)
        await reader.readexactly(int(length))
        if "connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return int(head.split()[1])

    async def closed_loop(self, clients: int, seconds: float) -> Seen:
        """So many clients, each of which asks again as soon as it is answered."""
        seen, start = Seen(), time.perf_counter()

        async def client() -> None:
            while (now := time.perf_counter()) < start + seconds:
                await self.ask(seen, now)

        await asyncio.gather(*(client() for _ in range(clients)))
        seen.seconds = time.perf_counter() - start
        return seen

    async def open_loop(self, rate: float, seconds: float) -> Seen:
        """Requests at random moments, so many a second."""
        seen, start, tasks = Seen(), time.perf_counter(), []
        due = start
        while (due := due + random.expovariate(rate)) < start + seconds:
            if (ahead := due - time.perf_counter()) > 0:
                await asyncio.sleep(ahead)
            tasks.append(asyncio.create_task(self.ask(seen, due)))
        await asyncio.gather(*tasks)
        seen.seconds = time.perf_counter() - start
        return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--events", type=int, default=500, help="of each request's history")
    parser.add_argument("--candidates", type=int, default=50, help="of each request")
    parser.add_argument("--compiled", action="store_true", help="compile the exported ranker with AOTInductor")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ranker.pt2"
        model = make()
        write(export(model), describe(model.sids, USERS), file, compiled=arguments.compiled)
        rows = under_load(file, arguments)
    print(
        f"{'offered':>8}{'capacity/s':>12}{'asked/s':>9}{'answered/s':>12}{'of capacity':>13}{'shed':>7}{'p50 ms':>9}{'p99 ms':>9}"
    )
    for row in rows:
        print(
            f"{row['share']:>7}x{row['capacity_per_s']:>12.0f}{row['offered_per_s']:>9.0f}{row['answered_per_s']:>12.0f}{row['of_capacity']:>13.2f}"
            f"{row['shed']:>7.0%}{row['p50_ms']:>9.1f}{row['p99_ms']:>9.1f}"
        )
    print(f"python {' '.join(sys.argv)}\n{machine()}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["failed"] for row in rows))


def under_load(file: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """A row for each share of the capacity."""
    command = ["serve", "--package", str(file), "--port", "0", "--threads", "1", "--pending", str(PENDING)]
    server = subprocess.Popen(
        [sys.executable, "-m", "sidrec_torchrec.cli", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline().rpartition(":")[2])
        return asyncio.run(loads(Clients(port, bodies(arguments)), arguments.seconds))
    finally:
        server.send_signal(signal.SIGTERM)
        if server.wait(60) != 0:
            raise SystemExit(f"the server ended with exit code {server.returncode}")


async def loads(clients: Clients, seconds: float) -> list[dict[str, float]]:
    """Measures the capacity anew before each load, as other work on the machine changes it."""
    await clients.closed_loop(PENDING // 2, 2)
    rows = []
    for share in SHARES:
        capacity = (await clients.closed_loop(PENDING // 2, seconds / 2)).row()["answered_per_s"]
        row = (await clients.open_loop(share * capacity, seconds)).row()
        of_capacity = row["answered_per_s"] / capacity
        rows.append({"share": share, "capacity_per_s": capacity, "of_capacity": of_capacity} | row)
    return rows


def bodies(arguments: argparse.Namespace) -> list[bytes]:
    """Requests in JSON."""
    made = [make_request(arguments.events, arguments.candidates) for _ in range(BODIES)]
    return [
        json.dumps(
            {
                "time": int(request["request_time_B"]),
                "history": {
                    "words": request["history_NW"].tolist(),
                    "labels": {"label": request["action_N"].tolist()},
                    "time": request["time_N"].tolist(),
                },
                "candidates": {"words": request["candidate_MW"].tolist()},
                "user": {"age": "2"},
            }
        ).encode()
        for request in made
    ]


if __name__ == "__main__":
    main()
