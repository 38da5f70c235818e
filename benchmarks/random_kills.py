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
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic

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
        run(folder, "whole", arguments)
        seconds = time.monotonic() - start
        counts = {"kills": 0, "runs": 0, "equal": 0}
        while counts["kills"] < arguments.kills:
            out = f"killed-{counts['runs']}"
            counts["runs"] += 1
            while counts["kills"] < arguments.kills and kill_once(folder, out, arguments, rng, seconds):
                counts["kills"] += 1
            run(folder, out, arguments)
            counts["equal"] += outcome(folder / out) == outcome(folder / "whole")
            print(
                f"{counts['kills']} kills, {counts['runs']} runs, {counts['equal']} equal", file=sys.stderr, flush=True
            )
        counts["leftovers"] = sum(1 for path in folder.rglob("*") if path.suffix in (".tmp", ".lock", ".new", ".old"))
    print(json.dumps(counts | {"whole_seconds": round(seconds, 1)}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2))
    sys.exit(counts["equal"] != counts["runs"])


def kill_once(folder: Path, out: str, arguments: argparse.Namespace, rng: random.Random, seconds: float) -> bool:
    """Whether the job was killed before it had ended."""
    job = start_job(folder, out, arguments)
    try:
        job.wait(rng.uniform(0.1, 1.0) * seconds)
    except subprocess.TimeoutExpired:
        workers = children(job.pid)
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        victims = workers if number == signal.SIGTERM or rng.random() < 0.5 else workers[:1]
        for worker in victims:
            try:
                os.kill(worker, number)
            except ProcessLookupError:
                continue
        job.wait(120)
        return not (folder / out / "metrics.json").exists()
    return False


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def run(folder: Path, out: str, arguments: argparse.Namespace) -> None:
    job = start_job(folder, out, arguments)
    if job.wait() != 0:
        raise SystemExit((folder / f"{out}.log").read_text())


def start_job(folder: Path, out: str, arguments: argparse.Namespace) -> subprocess.Popen:
    """``train-ranker`` under torchrun, with checkpoints every few batches."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.processes)]
    flags = ["--data", folder / "data", "--prepared", folder / "prepared", "--arm", "id", "--out", folder / out]
    flags += ["--epochs", arguments.epochs, "--batch-events", 512, "--checkpoint-minutes", 0.02, "--model.dropout", 0.2]
    with (folder / f"{out}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *launch, "-m", "sidrec_torchrec.cli", "train-ranker", *map(str, flags)],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )


def outcome(out: Path) -> tuple[dict[str, Any], list[str]]:
    """Metrics without times, and the digests of all weights and optimizer states."""
    metrics = {k: v for k, v in json.loads((out / "metrics.json").read_text()).items() if k not in TIMES}
    digests = []
    for name in ("best", "last"):
        entries = json.loads((out / "checkpoints" / name / "checkpoint.json").read_text())["entries"]
        digests += [f"{n} {c['offsets']} {c['sha256']}" for n, e in entries.items() for c in e.get("chunks", ())]
    return metrics, digests


if __name__ == "__main__":
    main()
