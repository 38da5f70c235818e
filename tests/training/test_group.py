"""Processes that lose one another say so in words, at once."""

import os
import socket
import subprocess
import sys

import pytest

from sidrec_torchrec.errors import LostPeerError
from sidrec_torchrec.training.group import process_group

WORK = """
import os, sys
import torch, torch.distributed as dist
from sidrec_torchrec.errors import LostPeerError
from sidrec_torchrec.training.group import process_group
with process_group() as processes:
    dist.barrier()
    if processes.rank == 1:
        os._exit(9)
    try:
        with process_group():
            dist.all_reduce(torch.ones(1))
    except LostPeerError as error:
        print(error, flush=True)
        os._exit(error.exit_code)
"""

UNLIKE = """
import time
from sidrec_torchrec.training.group import process_group
with process_group() as processes:
    time.sleep(2 * processes.rank)
    done = time.monotonic()
print(done, time.monotonic())
"""


def two_processes(work: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    return [
        subprocess.Popen(
            [sys.executable, "-c", work],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def test_processes_leave_together():
    told = [job.communicate(timeout=120)[0].split() for job in two_processes(UNLIKE)]
    (_, left), (done, _) = told
    assert float(left) >= float(done)


def test_a_process_that_loses_another_ends_in_words():
    jobs = two_processes(WORK)
    output, _ = jobs[0].communicate(timeout=120)
    assert jobs[1].wait() == 9 and jobs[0].returncode == 4
    assert output.startswith("process 0 of 2: another process has ended, and said why")
    assert len(output.splitlines()) == 1


def test_a_process_on_its_own_has_none_to_lose():
    with pytest.raises(RuntimeError, match="timed out") as error, process_group():
        raise RuntimeError("the user's own database timed out")
    assert not isinstance(error.value, LostPeerError)
