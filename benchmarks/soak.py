"""A day in the life of a ranker, again and again: trained, encoded, added to, asked; killed all the while, and compared.

    python benchmarks/soak.py --minutes 30

A round is ``train-tokenizer``, ``encode-corpus`` of the old items, ``encode-corpus --append`` of the new ones, ``train-ranker``
and ``predict``. Each is killed (SIGKILL or SIGTERM) at random moments, so many times, and then run to its end in this process.
What a round leaves must be what one round that nobody touched has left: weights, metrics, SIDs and predictions, bit for bit; no
item lost, none twice. This process lives on, so its memory and open files tell of leaks: the slopes are those of straight lines
through all rounds but the first two.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from random_kills import Job, leftovers, outcome

from sidrec_torchrec.cli import main as sidrec
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.training.progress import quiet

ITEMS, OLD_ITEMS = 500, 350
WARM_UP = 2  # rounds in which memory may grow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="no round begins after them")
    parser.add_argument("--kills", type=int, default=2, help="of each job and round, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name, quiet():
        counts = soak(Path(name), arguments)
    print(json.dumps(counts, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2) + "\n")
    sys.exit(bool(counts["rounds_that_differ"] or counts["leftovers"]))


def soak(folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Rounds until the time is over; what was counted."""
    rng = random.Random(arguments.seed)
    write_data(folder)
    seconds, whole = {}, folder / "whole"
    for step, command in steps(folder, whole).items():
        start = time.monotonic()
        Job(command, folder / "whole.log").run()
        seconds[step] = time.monotonic() - start
    expected = results(whole)
    end = time.monotonic() + 60 * arguments.minutes
    counts = {"rounds": 0, "kills": 0, "rounds_that_differ": 0, "leftovers": 0}
    memory, files = [], []
    while time.monotonic() < end:
        out = folder / "round"
        for step, command in steps(folder, out).items():
            job = Job(command, folder / "round.log")
            for _ in range(rng.randint(0, arguments.kills)):
                counts["kills"] += job.kill_once(rng, 0.3 * seconds[step], seconds[step])
            if sidrec(list(command)) != 0:
                raise SystemExit(f"{step} failed: {' '.join(command)}")
        differ = [name for name, value in results(out).items() if value != expected[name]]
        counts["rounds"] += 1
        counts["rounds_that_differ"] += bool(differ)
        counts["leftovers"] += len(leftovers(folder))
        memory.append(resident_mb())
        files.append(len(os.listdir("/proc/self/fd")))
        print(f"{counts}, {memory[-1]:.0f} MB, {files[-1]} open files {differ or ''}", file=sys.stderr, flush=True)
        shutil.rmtree(out)
    return counts | {
        "rss_mb": round(memory[-1], 1),
        "rss_mb_per_round": slope(memory),
        "open_files": files[-1],
        "open_files_per_round": slope(files),
    }


def write_data(folder: Path) -> None:
    """A corpus, its sequences, and a folder with its older items alone."""
    write_synthetic(SyntheticConfig(items=ITEMS, users=150, median_events=50), folder / "data")
    prepare(folder / "data", folder / "prepared", PrepareConfig(validation_fraction=0.2, cold_fraction=0.1))
    (folder / "old").mkdir()
    pq.write_table(pq.read_table(folder / "data" / "items.parquet")[:OLD_ITEMS], folder / "old" / "items.parquet")


def steps(folder: Path, out: Path) -> dict[str, tuple[str, ...]]:
    """The commands of a round that writes into ``out``, by name, in order."""
    encode = ["encode-corpus", "--tokenizer", out / "tokenizer", "--out", out / "sids"]
    often = ["--checkpoint-minutes", 0.02, "--batch-events", 512, "--epochs", 4]
    commands = {
        "tokenizer": ["train-tokenizer", "--data", folder / "old", "--out", out / "tokenizer", "--epochs", 20],
        "encode": [*encode, "--data", folder / "old"],
        "append": [*encode, "--data", folder / "data", "--append"],
        "ranker": ["train-ranker", "--data", folder / "data", "--prepared", folder / "prepared", *often]
        + ["--arm", "side", "--sids", out / "sids", "--out", out / "ranker", "--model.dropout", 0.2],
        "predict": ["predict", "--ranker", out / "ranker", "--newest", 3, "--out", out / "predicted.parquet"],
    }
    return {name: tuple(map(str, command)) for name, command in commands.items()}


def results(out: Path) -> dict[str, object]:
    """What a round has left, by name, to be compared."""
    ids, words_NW = read_sids(out / "sids", Codec.load(out / "sids"))
    items = ids.to_pylist()
    if len(items) != ITEMS or len(set(items)) != ITEMS:
        raise SystemExit(f"{len(items)} SIDs of {len(set(items))} items, there are {ITEMS} items")
    return {
        "tokenizer": outcome(out / "tokenizer"),
        "sids": dict(zip(items, map(tuple, words_NW.tolist()), strict=True)),
        "ranker": outcome(out / "ranker"),
        "predictions": pq.read_table(out / "predicted.parquet"),
    }


def resident_mb() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def slope(values: list[float]) -> float | None:
    """Of a straight line through all but the first; None of fewer than three."""
    kept = values[WARM_UP:]
    return round(float(np.polyfit(np.arange(len(kept)), kept, 1)[0]), 3) if len(kept) > 2 else None


if __name__ == "__main__":
    main()
