"""Sums and choices shared by all processes of a job, and files made once; a process on its own needs no other."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist
from torch import Tensor

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.storage.mirror import LOCK, locked
from sidrec_torchrec.storage.urls import is_made_beside

Result = TypeVar("Result")


def sum_over_processes(*tensors: Tensor) -> None:
    """Replaces each tensor by its sum over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_first_process(tensor: Tensor) -> None:
    """Replaces the tensor, of equal shape everywhere, by that of process 0, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def on_first_process(work: Callable[[], Result]) -> Result:
    """What ``work`` gives on process 0, which alone does it: tensors on the CPU, numbers, text; on every process.

    Raises:
        SidrecError, OSError: what ``work`` raised, on every process, none of which is left waiting.
    """
    held: list[Result | Exception | None] = [None]
    if is_first_process():
        try:
            held = [work()]
        except (SidrecError, OSError) as error:
            held = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(held, src=0)
    if isinstance(held[0], Exception):
        raise held[0]
    return cast(Result, held[0])


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Makes a file or folder that is not there: by process 0 for all, or, in a place of this machine's own, by one of its processes.

    Args:
        path: of the file; see ``storage.urls.made_beside``.
        make: is given the path, and writes it whole or not at all.

    Raises:
        SidrecError, OSError: what ``make`` raised.
    """
    if not is_made_beside(path):
        on_first_process(lambda: None if path.exists() else make(path))
        return path
    with locked(path.with_name(f"{path.name}{LOCK}")):
        if not path.exists():
            make(path)
    return path


def is_first_process() -> bool:
    """Whether this is process 0, or a process on its own."""
    return not dist.is_initialized() or dist.get_rank() == 0
