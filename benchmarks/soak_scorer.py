"""A package under load for a long time: threads and processes ask at random, and every answer is compared with a known one.

    python benchmarks/soak_scorer.py --minutes 60

The time is shared out among a compiled and an interpreted package, each asked by 1, 2 and 8 threads of one process, and by 4
processes of 2 threads. A call that does not come back within a minute is a hang. Memory is that of the asking processes
together, its slope that of a straight line through what was seen after the first quarter of the time.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from serving_latency import USERS, make, make_request
from soak import resident_mb
from torch import Tensor

from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import export

REQUESTS = 40  # that are asked again and again
HANG_SECONDS = 60
TOLERANCE = 1e-5
SIZES = (0, 1, 7, 100, 1_000, 3_000), (1, 5, 50, 200)  # events and candidates to draw from
Known = list[tuple[dict[str, Tensor], Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of all cases together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_packages(Path(folder))
        cases = [(kind, *case) for kind in files for case in ((1, 1), (1, 2), (1, 8), (4, 2))]
        seconds = 60 * arguments.minutes / len(cases)
        for kind, processes, threads in cases:
            row = {"package": kind, "processes": processes, "threads": threads}
            rows.append(row | ask(files[kind], processes, threads, seconds, arguments.seed))
            print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps(rows, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(any(row["wrong"] or row["hangs"] for row in rows))


def write_packages(folder: Path) -> dict[str, Path]:
    """One ranker as two packages; and requests with what the ranker itself says of them."""
    torch.manual_seed(0)
    model = make()
    files = {"compiled": folder / "compiled.pt2", "interpreted": folder / "interpreted.pt2"}
    for kind, file in files.items():
        write(export(model), describe(model.sids, USERS), file, compiled=kind == "compiled")
    rng = random.Random(0)
    requests = [make_request(*map(rng.choice, SIZES)) for _ in range(REQUESTS)]
    with torch.inference_mode():
        torch.save([(request, model(**request)) for request in requests], folder / "known.pt")
    return files


def ask(file: Path, processes: int, threads: int, seconds: float, seed: int) -> dict[str, float | None]:
    """Asks a package for so long, by so many processes; what was counted in all of them."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes) as pool:
        calls = [pool.apply_async(ask_here, (file, threads, seconds, seed + p)) for p in range(processes)]
        found = []
        for call in calls:
            try:
                found.append(call.get(seconds + 5 * HANG_SECONDS))
            except multiprocessing.TimeoutError:
                found.append({"answers": 0, "wrong": 0, "hangs": 1, "rss_mb": 0.0, "rss_kb_per_minute": 0.0})
    return {name: round(sum(one[name] for one in found), 1) for name in found[0]}


def ask_here(file: Path, threads: int, seconds: float, seed: int) -> dict[str, float]:
    """Asks a package by threads of this process."""
    torch.set_num_threads(1)
    scorer, known = Scorer(file, parallel=threads), torch.load(file.parent / "known.pt")
    start = time.monotonic()
    counts = [{"answers": 0, "wrong": 0, "since": start} for _ in range(threads)]
    workers = [
        threading.Thread(
            target=ask_on, args=(scorer, known, start + seconds, random.Random(seed + t), counts[t]), daemon=True
        )
        for t in range(threads)
    ]
    for worker in workers:
        worker.start()
    times, memory = [], []
    while any(worker.is_alive() for worker in workers) and not hung(counts):
        time.sleep(min(1.0, seconds / 20))
        times.append((time.monotonic() - start) / 60)
        memory.append(resident_mb() * 1000)
    first = len(times) // 4
    return {
        "answers": sum(count["answers"] for count in counts),
        "wrong": sum(count["wrong"] for count in counts),
        "hangs": sum(worker.is_alive() for worker in workers),
        "rss_mb": memory[-1] / 1000,
        "rss_kb_per_minute": float(np.polyfit(times[first:], memory[first:], 1)[0]),
    }


def ask_on(
    scorer: Callable[..., Tensor], known: Known, end: float, rng: random.Random, count: dict[str, float]
) -> None:
    """Asks until the time is over; counts in place."""
    while time.monotonic() < end:
        request, expected = rng.choice(known)
        count["since"] = time.monotonic()
        try:
            right = torch.allclose(scorer(**request), expected, rtol=0, atol=TOLERANCE)
        except Exception as error:  # noqa: BLE001  it is counted, and the others go on
            print(repr(error), file=sys.stderr, flush=True)
            right = False
        count["answers"] += 1
        count["wrong"] += not right
    count["since"] = float("inf")


def hung(counts: list[dict[str, float]]) -> bool:
    """Whether a call has been at work for too long."""
    return any(time.monotonic() - count["since"] > HANG_SECONDS for count in counts)


if __name__ == "__main__":
    main()
