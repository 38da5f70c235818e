"""Sums and choices shared by all processes of a job; a process on its own needs neither."""

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


def is_first_process() -> bool:
    """Whether this is process 0, or a process on its own."""
    return not dist.is_initialized() or dist.get_rank() == 0
