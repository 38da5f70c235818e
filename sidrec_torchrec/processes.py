"""Sums and choices shared by all processes of a job; a process on its own needs neither."""

from typing import Any

import torch.distributed as dist
from torch import Tensor


def sum_over_processes(*tensors: Tensor) -> None:
    """Replaces each tensor by its sum over all processes, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def copy_from_first_process(tensor: Tensor) -> None:
    """Replaces the tensor, of equal shape everywhere, by that of process 0, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def object_from_first_process(value: Any) -> Any:
    """What process 0 gave: tensors on the CPU, numbers, text, an exception."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def is_first_process() -> bool:
    """Whether this is process 0, or a process on its own."""
    return not dist.is_initialized() or dist.get_rank() == 0
