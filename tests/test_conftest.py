"""The distributed helper is itself a measuring instrument: it must really communicate, and really fail."""

import pytest
import torch
import torch.distributed as dist


def sum_of_ranks(scale: int) -> tuple[int, int]:
    total = torch.tensor(scale * dist.get_rank())
    dist.all_reduce(total)
    return dist.get_rank(), int(total)


def fail_on_last_rank() -> None:
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank is unhappy")
    dist.barrier()


def test_every_rank_runs_and_communicates(run_distributed):
    assert run_distributed(sum_of_ranks, 2, 10) == [(0, 10), (1, 10)]


def test_a_failing_rank_reports_its_traceback(run_distributed):
    with pytest.raises(RuntimeError, match="(?s)^rank 1.*the last rank is unhappy"):
        run_distributed(fail_on_last_rank, 2)
