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
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.files import read_object

TIMES = ("train_seconds", "train_events_per_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_synthetic(SyntheticConfig(items=500, users=200, median_events=60), folder / "data")
        prepare(folder / "data", folder / "prepared", PrepareConfig(validation_fraction=0.2, cold_fraction=0.1))
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

    def start(self) -> subprocess.Popen:
        """The command at work."""
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes)]
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, *launch[: 5 * (self.processes > 1)], "-m", "sidrec_torchrec.cli", *self.command],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            )

    def run(self) -> None:
        """Runs it to its end."""
        if self.start().wait() != 0:
            raise SystemExit(self.log.read_text())

    def workers(self, job: subprocess.Popen) -> list[int]:
        """Its processes; torchrun takes a while to start them."""
        if self.processes == 1:
            return [job.pid]
        while not (found := children(job.pid)) and job.poll() is None:
            time.sleep(0.1)
        return found

    def kill_once(self, rng: random.Random, first: float, last: float) -> bool:
        """Whether it was hit before it had ended, at a moment between so many seconds after its start."""
        job = self.start()
        try:
            job.wait(rng.uniform(first, last))
        except subprocess.TimeoutExpired:
            workers = self.workers(job)
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            victims = workers if number == signal.SIGTERM or rng.random() < 0.5 else workers[:1]
            for worker in victims:
                try:
                    os.kill(worker, number)
                except ProcessLookupError:
                    continue
        return job.wait(120) != 0


def children(pid: int) -> list[int]:
    """Processes that it has started; none, if it has ended."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except FileNotFoundError:
        return []
    return [int(child) for child in text.split()]


def training(folder: Path, out: str, arguments: argparse.Namespace) -> Job:
    """``train-ranker`` under torchrun, with checkpoints every few batches."""
    flags = ["--data", folder / "data", "--prepared", folder / "prepared", "--arm", "id", "--out", folder / out]
    flags += ["--epochs", arguments.epochs, "--batch-events", 512, "--checkpoint-minutes", 0.02, "--model.dropout", 0.2]
    return Job(("train-ranker", *map(str, flags)), folder / f"{out}.log", arguments.processes)


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
