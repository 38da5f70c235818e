"""Fixtures for every test: one thread per process, real process groups, the real data where it is at hand."""

import os

os.environ.setdefault("RAY_worker_niceness", "0")  # else 15, which on a busy machine is for ever
os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: the tests' own processes share the cores

import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: its kernels then run on the CPU

from sidrec_torchrec.training.group import process_group

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data beside the checkout; the test is skipped where there is none."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing")
    return folder


@pytest.fixture
def run_distributed(tmp_path: Path) -> Callable[..., list[Any]]:
    """``run_distributed(fn, world_size, *args)`` calls ``fn(*args)`` on every rank of a real gloo group.

    ``fn`` must be a function of a module (it is pickled by name). Returns what each rank returned, in rank order; a
    failure on any rank ends all of them and raises RuntimeError with the tracebacks, the first failure first.
    """

    def run(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            mp.spawn(_run_rank, args=(fn, world_size, port, tmp_path, args), nprocs=world_size)
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            # spawn names the process it saw die first, often a rank that merely lost its peer
            failures = sorted(tmp_path.glob("failure_of_rank_*.txt"), key=lambda path: path.stat().st_mtime_ns)
            raise RuntimeError("\n".join(path.read_text() for path in failures) or str(error)) from None
        return [torch.load(_result_path(tmp_path, rank), weights_only=False) for rank in range(world_size)]

    return run


def _run_rank(rank: int, fn: Callable[..., Any], world_size: int, port: int, folder: Path, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        CUDA_VISIBLE_DEVICES="",  # gloo on CPU whatever the machine has, so that two ranks never share one GPU
    )
    torch.set_num_threads(1)
    with process_group():
        try:
            result = fn(*args)
        except BaseException:
            (folder / f"failure_of_rank_{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
            raise
    torch.save(result, _result_path(folder, rank))


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"result_of_rank_{rank}.pt"
