"""Seconds that checking and preparing a log take, by how it is kept; against another checkout of this package.

    python benchmarks/logs.py --peer ../sidrec-before

Each measurement is a process of its own, and the two take turns; without ``--peer`` the peer is the same log with int64 ids
in one file, read by this checkout.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from comparison import Comparisons

_OWN = Path(__file__).resolve().parents[1]
_MEASURE = """
import sys, time, resource
from pathlib import Path
from sidrec_torchrec.data.format import validate
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
data, out = map(Path, sys.argv[1:])
start = time.perf_counter(); validate(data); middle = time.perf_counter()
prepare(data, out, PrepareConfig()); end = time.perf_counter()
print(middle - start, end - middle, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=2_000_000)
    parser.add_argument("--items", type=int, default=50_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="another checkout, which reads the int64 log")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logs = write_logs(Path(folder), arguments)
        compare(logs, arguments).finish(arguments.json)


def compare(logs: dict[str, Path], arguments: argparse.Namespace) -> Comparisons:
    """Each kind of log against the peer's time for int64 ids in one file."""
    comparisons = Comparisons(
        f"a log of {arguments.events:,} events, {arguments.users:,} users, {arguments.items:,} items"
    )
    peer, plain = arguments.peer or _OWN, logs["int64, one file"]
    for kind, log in logs.items():
        if log == plain and arguments.peer is None:
            continue
        runs = [(measure(_OWN, log), measure(peer, plain)) for _ in range(arguments.repeats)]
        for place, metric in enumerate(("validate, microseconds an event", "prepare, microseconds an event")):
            ours, theirs = (median(run[side][place] for run in runs) / arguments.events * 1e6 for side in (0, 1))
            comparisons.add(kind, metric, ours, f"int64, one file, by {peer.name}", theirs, lower_is_better=True)
        ours, theirs = (median(run[side][2] for run in runs) for side in (0, 1))
        comparisons.add(
            kind, "peak memory, GiB", ours, f"int64, one file, by {peer.name}", theirs, lower_is_better=True
        )
    return comparisons


def measure(checkout: Path, log: Path) -> list[float]:
    """Seconds of validate and of prepare, and GiB."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-c", _MEASURE, str(log), f"{out}/prepared"]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        done = subprocess.run(command, env=environment, cwd=out, check=True, capture_output=True, text=True)
    return [float(value) for value in done.stdout.split()[-3:]]


def write_logs(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """The same log in several forms."""
    rng = np.random.default_rng(0)
    N, I, U = arguments.events, arguments.items, arguments.users
    user = np.sort(rng.integers(0, U, N))
    item = np.minimum((I * rng.random(N) ** 2).astype(np.int64), I - 1)
    time = 1_700_000_000 + np.arange(N)
    label = rng.integers(0, 2, N).astype(np.int8)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(I * 16).astype(np.float32)), 16)
    log = {"user_id": user, "item_id": item, "timestamp": time, "label": label}
    text = {"user_id": _named("user", user), "item_id": _named("item", item)}
    forms = {
        "int64, one file": (np.arange(I), log, 1),
        "int64, 16 parts": (np.arange(I), log, 16),
        "text ids": (_named("item", np.arange(I)), log | text, 1),
        "timestamps in microseconds": (
            np.arange(I),
            log | {"timestamp": pa.array(time * 10**6, pa.timestamp("us"))},
            1,
        ),
    }
    folders = {}
    for number, (kind, (ids, columns, parts)) in enumerate(forms.items()):
        path = folder / str(number)
        (path / "events").mkdir(parents=True)
        pq.write_table(pa.table({"item_id": ids, "emb": vectors}), path / "items.parquet")
        table, step = pa.table(columns), -(-N // parts)
        for part in range(parts):
            pq.write_table(table.slice(part * step, step), path / "events" / f"{part:02d}.parquet")
        if parts == 1:
            (path / "events" / "00.parquet").rename(path / "events.parquet")
            (path / "events").rmdir()
        folders[kind] = path
    return folders


def _named(kind: str, numbers: np.ndarray) -> pa.Array:
    names = pa.array([f"{kind}-{number:012d}" for number in range(int(numbers.max()) + 1)])
    return names.take(pa.array(numbers))


if __name__ == "__main__":
    main()
