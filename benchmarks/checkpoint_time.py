"""How long training stands still while a checkpoint is written, and what share that is of the ten minutes between two.

python benchmarks/checkpoint_time.py --mb 100
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from sidrec_torchrec.training.checkpoints import LAST, Checkpoints
from sidrec_torchrec.training.group import process_group

TENSORS = 10
BETWEEN = 600.0  # seconds, --checkpoint-minutes' default


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=100, help="of model and optimizer")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    size = arguments.mb * 250_000 // TENSORS
    state = {"model": {str(number): torch.randn(size) for number in range(TENSORS)}}
    with process_group(), tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            start, work = time.monotonic(), time.process_time()
            Checkpoints(Path(folder) / "checkpoints").save(LAST, state)
            wall, work = time.monotonic() - start, time.process_time() - work
            print(
                f"{arguments.mb} MB: {wall:.2f} s, of which {work:.2f} s of CPU; {wall / BETWEEN:.2%} of the time between two"
            )


if __name__ == "__main__":
    main()
