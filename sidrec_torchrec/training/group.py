"""The process group a job runs in: torchrun's, or a group of one when started by hand."""

import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sidrec_torchrec.errors import LostPeerError, SidrecError, first_line

_LOST = re.compile(  # what gloo, NCCL and torch's store say of it
    r"closed by peer|reset by peer|refused|broken pipe|timed out|timeout|remote process exited|communicator was aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process's place among all of them.

    Args:
        rank: 0 <= rank < world_size.
        world_size: number of processes.
        device: where this process computes; CUDA (NCCL) if there is a GPU, else CPU (gloo).
    """

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and shows progress."""
        return self.rank == 0


def fixed_buckets() -> dict[str, Any]:
    """Arguments of DistributedDataParallel with which a resumed run adds gradients up as the one that was interrupted.

    By default it lays them out anew after its first step, in the order in which they came; and where a gradient lies says in
    which order three processes or more add it up, which shows in the last bits.
    """
    return {"static_graph": False, "find_unused_parameters": True} if dist.get_world_size() > 1 else {}


@contextmanager
def process_group() -> Iterator[Processes]:
    """Joins torchrun's process group, or makes one of a single process; reuses a group that is already up.

    Raises:
        LostPeerError: when another process of the group has ended, or does not answer.
    """
    joined = not dist.is_initialized()
    _minutes()  # a mistake in it shows at once, and not on many nodes first
    if joined:
        _quiet_libraries()
        _start_group()
    try:
        yield current_processes()
        if joined and dist.get_world_size() > 1:
            dist.barrier()  # all leave together: one still at work may need those that are done
    except RuntimeError as error:
        if dist.get_world_size() == 1 or not _LOST.search(str(error)):
            raise
        raise LostPeerError(
            f"process {dist.get_rank()} of {dist.get_world_size()}: another process has ended, and said why, or has not "
            f"answered for {_minutes():g} minutes (set SIDREC_TIMEOUT_MINUTES if its work takes longer)"
        ) from error
    finally:
        if joined:
            dist.destroy_process_group()


def current_processes() -> Processes:
    """The running group, as seen from here."""
    return Processes(rank=dist.get_rank(), world_size=dist.get_world_size(), device=own_device())


def own_device() -> torch.device:
    """Where this process computes: on its GPU, ``LOCAL_RANK`` of the machine, or the CPU if there is none."""
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


def _minutes() -> float:
    """How long a collective may take.

    Raises:
        SidrecError: if the environment's ``SIDREC_TIMEOUT_MINUTES`` is no such number.
    """
    text = os.environ.get("SIDREC_TIMEOUT_MINUTES", "30")
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise SidrecError(f"SIDREC_TIMEOUT_MINUTES is '{text}'; give a number of minutes above 0")
    return minutes


def _start_group() -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=_minutes()))
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise SidrecError(
                f"the processes cannot meet at {where} ({first_line(error)}); name a free port and a host that all can reach"
            ) from error
        return
    # A group of one needs neither a port, which another process may take, nor variables, which children would inherit.
    hook = sys.excepthook
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    sys.excepthook = hook  # torch's puts the rank before each line of a traceback, once more with each group


def _show_of_thread(error: threading.ExceptHookArgs) -> None:
    """Shows no traceback of a full disk: TensorBoard's thread tells whoever writes the next curve, who says it in a line."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _quiet_libraries() -> None:
    """Keeps a job's output readable: known remarks of torch, torchrec and torchmetrics on their own internals are not shown."""
    for name in ("torchrec", "torch.fx", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        for module in ("torch", "torchrec", "torchmetrics", "fbgemm_gpu"):
            warnings.filterwarnings("ignore", category=category, module=rf"{module}(\.|$)")
    threading.excepthook = _show_of_thread
    # blamed on whoever asks a ShardedTensor for its size, which is us
    warnings.filterwarnings("ignore", category=FutureWarning, message="Please use DTensor instead")
