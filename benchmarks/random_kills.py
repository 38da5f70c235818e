"""Kills a training job at random moments, again and again, and compares what it ends with to a run that nobody touched.

    python benchmarks/random_kills.py --kills 20 --processes 2

Each time, at a moment drawn anew, either one process or all are killed (SIGKILL), or all are asked to stop (SIGTERM); the same
command is then run again. In the end metrics and the weights of both checkpoints must be the same, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidrec_torchrec import cli
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.files import read_object
from sidrec_torchrec.jobs import train_ranker  # noqa: F401 - imported once, before processes fork

TIMES = ("train_seconds", "train_events_per_s")
ALONE = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument(
        "--fork", action="store_true", help="without torchrun, whose start takes longer than the training"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder)
        start = time.monotonic()
        training(folder, "whole", arguments).run()
        seconds = time.monotonic() - start
        counts = {"kills": 0, "runs": 0, "equal": 0}
        while counts["kills"] < arguments.kills:
            out = f"killed-{counts['runs']}"
            job = training(folder, out, arguments)
            counts["runs"] += 1
            while counts["kills"] < arguments.kills and job.kill_once(rng, 0.1 * seconds, seconds):
                counts["kills"] += 1
            job.run()
            counts["equal"] += outcome(folder / out) == outcome(folder / "whole")
            print(
                f"{counts['kills']} kills, {counts['runs']} runs, {counts['equal']} equal", file=sys.stderr, flush=True
            )
        counts["leftovers"] = len(leftovers(folder))
    print(json.dumps(counts | {"whole_seconds": round(seconds, 1)}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2))
    sys.exit(counts["equal"] != counts["runs"])


def make_data(folder: Path) -> None:
    """What is trained on; in a process of its own, so that no thread of Arrow's is there when others are forked."""
    if child := os.fork():
        if os.waitpid(child, 0)[1]:
            raise SystemExit("the data could not be made")
        return
    write_synthetic(SyntheticConfig(items=500, users=200, median_events=60), folder / "data")
    prepare(folder / "data", folder / "prepared", PrepareConfig(validation_fraction=0.2, cold_fraction=0.1))
    os._exit(0)


@dataclass(frozen=True)
class Job:
    """A command that may be killed and run again.

    Args:
        command: of ``sidrec``, and its flags.
        log: file that what it says is added to.
        processes: under torchrun, if there are several.
    """

    command: tuple[str, ...]
    log: Path
    processes: int = 1

    def start(self) -> "Running":
        """The command at work."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        with self.log.open("a") as log:
            return Running(
                subprocess.Popen(
                    [sys.executable, *launch[: 5 * (self.processes > 1)], "-m", "sidrec_torchrec.cli", *self.command],
                    stdout=log,
                    stderr=log,
                    env=os.environ | ALONE,
                ),
                self.processes,
            )

    def run(self) -> None:
        """Runs it to its end."""
        if self.start().wait() != 0:
            raise SystemExit(self.log.read_text())

    def kill_once(self, rng: random.Random, first: float, last: float) -> bool:
        """Whether it was hit before it had ended, at a moment between so many seconds after its start."""
        job = self.start()
        try:
            job.wait(rng.uniform(first, last))
        except TimeoutError:
            workers = job.workers()
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            victims = workers if number == signal.SIGTERM or rng.random() < 0.5 else workers[:1]
            for worker in victims:
                with suppress(ProcessLookupError):
                    os.kill(worker, number)
        return job.wait(120) != 0


class Running:
    """A command at work, as torchrun runs it, or alone."""

    def __init__(self, process: subprocess.Popen, processes: int) -> None:
        self._process, self._processes = process, processes

    def wait(self, seconds: float | None = None) -> int:
        """Its exit code; TimeoutError if it has not ended by then."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error

    def workers(self) -> list[int]:
        """Its processes; torchrun takes a while to start them."""
        if self._processes == 1:
            return [self._process.pid]
        while not (found := children(self._process.pid)) and self._process.poll() is None:
            time.sleep(0.1)
        return found


@dataclass(frozen=True)
class ForkedJob(Job):
    """The same command in processes that are forked from this one, which has imported all that takes seconds; as torchrun does, it
    ends the others when one dies.
    """

    def start(self) -> "Forked":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(self.processes)}
        return Forked([self._fork(rank, group) for rank in range(self.processes)])

    def _fork(self, rank: int, group: dict[str, str]) -> int:
        if child := os.fork():
            return child
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= ALONE
            if self.processes > 1:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(self.processes)}
                os.environ |= group | own
            code = cli.main(list(self.command))
        except BaseException:  # noqa: BLE001 - all that Python would show at the process' end
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


class Forked(Running):
    """Forked processes at work."""

    def __init__(self, pids: list[int]) -> None:
        self._alive, self._code = pids, 0

    def wait(self, seconds: float | None = None) -> int:
        end = None if seconds is None else time.monotonic() + seconds
        while self._alive:
            for pid in list(self._alive):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._alive.remove(pid)
                    if status:
                        self._code = self._code or 1
                        for other in self._alive:
                            os.kill(other, signal.SIGTERM)
            if self._alive and end is not None and time.monotonic() >= end:
                raise TimeoutError(f"{len(self._alive)} processes have not ended")
            time.sleep(0.02)
        return self._code

    def workers(self) -> list[int]:
        return list(self._alive)


def children(pid: int) -> list[int]:
    """Processes that it has started; none, if it has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def training(folder: Path, out: str, arguments: argparse.Namespace) -> Job:
    """``train-ranker``, with checkpoints every few batches."""
    flags = ["--data", folder / "data", "--prepared", folder / "prepared", "--arm", "id", "--out", folder / out]
    flags += ["--epochs", arguments.epochs, "--batch-events", 512, "--checkpoint-minutes", 0.02, "--model.dropout", 0.2]
    job = ForkedJob if arguments.fork else Job
    return job(("train-ranker", *map(str, flags)), folder / f"{out}.log", arguments.processes)


def leftovers(folder: Path) -> list[Path]:
    """Files that only a job at work should have."""
    return [path for path in folder.rglob("*") if path.suffix in (".tmp", ".lock", ".new", ".old")]


def outcome(out: Path) -> tuple[dict[str, Any], list[str]]:
    """Metrics without times, and the digests of all weights and optimizer states."""
    metrics = {k: v for k, v in read_object(out / "metrics.json").items() if k not in TIMES}
    digests = []
    for name in ("best", "last"):
        entries = json.loads((out / "checkpoints" / name / "checkpoint.json").read_text())["entries"]
        digests += [f"{n} {c['offsets']} {c['sha256']}" for n, e in entries.items() for c in e.get("chunks", ())]
    return metrics, digests


if __name__ == "__main__":
    main()
