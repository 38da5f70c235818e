"""What each process reads of the training sequences, and how evenly batches are shared out; by number of processes.

    python benchmarks/reading.py --users 20000

The peer is one process, which reads all. Bytes are what the operating system says a process read in one epoch, checksums of the parts
included, and the whole index, which is mapped. Shares are of events: the largest over the mean, of the epoch, and of a batch on average.
"""

import argparse
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np
from comparison import Comparisons

from sidrec_torchrec.data.batch_plan import pools
from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.ranker.arms import ARMS, ArmInputs
from sidrec_torchrec.ranker.arms.base import ArmConfig

WORLD_SIZES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--median-events", type=int, default=100)
    parser.add_argument("--batch-events", type=int, default=8_192, help="for each process")
    parser.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    comparisons = Comparisons("reading training sequences")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = SyntheticConfig(items=arguments.items, users=arguments.users, median_events=arguments.median_events)
        write_synthetic(log, folder / "data")
        prepare(folder / "data", folder / "prepared", PrepareConfig())
        alone = 0
        for world_size in WORLD_SIZES:
            batch_events = arguments.batch_events * world_size
            read = [in_a_process(folder / "prepared", rank, world_size, batch_events) for rank in range(world_size)]
            alone = alone or max(read)
            case = f"{world_size} processes"
            comparisons.add(case, "MB a process", max(read) / 1e6, "one process", alone / 1e6, lower_is_better=True)
            epoch, batch = shares(folder / "prepared", world_size, batch_events)
            comparisons.add(case, "largest share, epoch", epoch, "even", 1.0, lower_is_better=True)
            comparisons.add(case, "largest share, batch", batch, "even", 1.0, lower_is_better=True)
    comparisons.finish(arguments.json)


def in_a_process(folder: Path, rank: int, world_size: int, batch_events: int) -> int:
    """Bytes that a process reads of its share, in a process that has read nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(read_share, (folder, rank, world_size, batch_events))


def read_share(folder: Path, rank: int, world_size: int, batch_events: int) -> int:
    """Reads an epoch."""
    prepared = open_prepared(folder)
    features = ARMS["none"](ArmInputs(num_items=prepared.num_items), ArmConfig())
    before = bytes_read()
    for _ in SequenceBatches(
        prepared, "train", features, batch_events=batch_events, rank=rank, world_size=world_size, shuffle=True
    ):
        pass
    return bytes_read() - before + (prepared.path("train") / "_index.arrow").stat().st_size


def bytes_read() -> int:
    """By this process, from files or pipes, cached or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def shares(folder: Path, world_size: int, batch_events: int) -> tuple[float, float]:
    """The largest share of events over the mean: of an epoch, and of its batches on average."""
    rng, total, of_batches = np.random.default_rng(0), np.zeros(world_size), []
    with open_sequences(open_prepared(folder).path("train")) as files:
        for pool in pools(files, rng):
            for batch in pool.batches(batch_events, rng):
                events_B = [pool.looks[p].events_R[r] for p, r in zip(batch.place_B, batch.row_B, strict=True)]
                events = np.bincount(batch.place_B % world_size, weights=events_B, minlength=world_size)
                of_batches.append(events.max() / events.mean())
                total += events
    return float(total.max() / total.mean()), float(np.mean(of_batches))


if __name__ == "__main__":
    main()
