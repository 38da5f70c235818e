"""Checkpoints that are broken, of another model, or cannot be written: one line that names them."""

import resource

import pytest
import torch

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.training.checkpoints import LAST, Checkpoints
from sidrec_torchrec.training.group import process_group


def state(rows: int, value: float = 0.0) -> dict:
    return {"model": {"weight": torch.full((rows,), value)}, "place": "start"}


def test_a_broken_checkpoint_is_named(tmp_path):
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(LAST, state(100))
        with pytest.raises(SidrecError, match=r"last: a broken checkpoint, or of another model \(.*; remove "):
            checkpoints.load(LAST, state(99))
        for path in (tmp_path / LAST).iterdir():
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])
            with pytest.raises(SidrecError, match="last: a broken checkpoint, or of another model"):
                checkpoints.load(LAST, state(100))
            path.write_bytes(content)
        checkpoints.load(LAST, state(100))


def test_on_a_full_disk_the_checkpoint_before_stays(tmp_path):
    with process_group():
        checkpoints = Checkpoints(tmp_path)
        checkpoints.save(LAST, state(100, 1.0))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(SidrecError, match="last.new: cannot be written"):
                checkpoints.save(LAST, state(100_000, 2.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        held = state(100)
        checkpoints.load(LAST, held)
        assert (held["model"]["weight"] == 1).all()
        checkpoints.save(LAST, state(100_000, 2.0))  # over what was left of the failed one
        checkpoints.load(LAST, state(100_000))
