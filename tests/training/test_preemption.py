"""Runs that are asked to stop: the same on all processes, kept, and bit for bit as if nothing had happened."""

import dataclasses
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sidrec_torchrec.errors import PreemptedError
from sidrec_torchrec.training.agreement import Agreement, Wish, catch_signals
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.loop import Course, Loop, LoopConfig
from sidrec_torchrec.training.trackers import Trackers
from sidrec_torchrec.training.trainee import Step, Trainee
from tests.training.test_loop import Rate

BATCHES, EPOCHS = 5, 3


class Drawing(Trainee):
    """Each batch adds what is drawn to the weight, seeded once an epoch; a process's loss is its own.

    Args:
        stop: process, epoch and batch at which that process gets the signal; batch 5 is within validation.
    """

    name, losses, epoch_size, starts_trained = "drawing", ("loss",), BATCHES, True

    def __init__(self, stop: tuple[int, int, int] | None = None, number: int = signal.SIGTERM) -> None:
        self.model, self.optimizer = nn.Linear(1, 1, dtype=torch.float64), Rate()
        nn.init.zeros_(self.model.weight)
        self.stop, self.number, self.epoch = stop, number, 0

    def steps(self, epoch, first, before_step):
        self.epoch = epoch + 1
        for batch in range(first, BATCHES):
            before_step()
            self._interrupt(epoch, batch)
            drawn = torch.rand(())  # own to the process
            shared = drawn.double()
            dist.all_reduce(shared)
            with torch.no_grad():
                self.model.weight += shared
            yield Step(1, drawn.reshape(1) / 3, torch.ones(1))

    def _interrupt(self, epoch, batch):
        if self.stop == (dist.get_rank(), epoch, batch):
            os.kill(os.getpid(), self.number)

    def batch(self, epoch, number):
        return {}

    def seed(self, epoch, batch):
        if batch == 0:
            torch.manual_seed(10 * epoch + dist.get_rank())

    def validate(self, progress):
        for _ in range(3):
            self._interrupt(self.epoch - 1, BATCHES)
            progress.advance()
        return {"score": -float(self.model.weight.detach())}

    def score(self, values):
        return values["score"]

    def total(self, losses):
        return losses["loss"]


@pytest.fixture(autouse=True)
def signals_as_they_come():
    """Under nohup SIGHUP is ignored, as jobs respect."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def train(trainee: Drawing, folder: Path, **changes) -> tuple[Course, float]:
    with process_group() as processes:
        course = Loop(trainee, LoopConfig(epochs=EPOCHS, **changes), folder, processes, Trackers()).run()
    return dataclasses.replace(course, seconds=0), float(trainee.model.weight.detach())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("stop", [(-1, BATCHES), (0, 0), (1, 3), (2, BATCHES - 1), (1, BATCHES), (2, BATCHES)])
def test_a_stopped_run_ends_as_a_whole_one(stop, number, tmp_path):
    before = signal.getsignal(number)
    whole = train(Drawing(), tmp_path / "whole")
    with pytest.raises(PreemptedError, match=f"stopped by {number.name} after batch .*run again") as error:
        train(Drawing((0, *stop), number), tmp_path / "stopped")
    assert error.value.exit_code == 128 + number
    assert train(Drawing(), tmp_path / "stopped") == whole
    assert signal.getsignal(number) is before


def test_it_stops_after_the_step_at_hand(tmp_path):
    trainee = Drawing((0, 1, 3))
    with pytest.raises(PreemptedError, match="after batch 4 of epoch 2"):
        train(trainee, tmp_path)


def test_checkpoints_by_time_change_nothing(tmp_path):
    assert train(Drawing(), tmp_path / "often", checkpoint_minutes=0) == train(Drawing(), tmp_path / "seldom")


def test_states_of_the_last_epochs_are_kept_to_go_back_to(tmp_path, capsys):
    whole = train(Drawing(), tmp_path / "whole")
    with pytest.raises(PreemptedError):
        train(Drawing((0, EPOCHS - 1, 2)), tmp_path / "kept", keep_epochs=2)
    checkpoints = tmp_path / "kept" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"best", "last", "epoch-1", "epoch-2"}
    for name in ("last", "epoch-2"):
        (path,) = (checkpoints / name).glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert train(Drawing(), tmp_path / "kept", keep_epochs=2) == whole
    said = capsys.readouterr().err
    assert "checkpoints/last: a broken checkpoint; the run goes on from 'epoch-2'" in said
    assert "checkpoints/epoch-2: a broken checkpoint; the run goes on from 'epoch-1'" in said
    assert {path.name for path in checkpoints.iterdir()} == {"best", "last", "epoch-2", "epoch-3"}


def test_two_processes(run_distributed, tmp_path):
    first, second = run_distributed(_on_two_processes, 2, tmp_path)
    for ran in (first, second):
        whole = ran["whole"]
        assert ran["stopped"] == [(143, whole)] * 3  # both stop when one is told, and go on as if nothing had been
        assert ran["often"] == whole  # whenever checkpoints are made
        assert ran["agreed"] == [Wish.GO_ON, Wish.SAVE, Wish.GO_ON, Wish.FAIL, Wish.STOP]
    assert first["whole"] == second["whole"]
    losses = [epoch["loss"] for epoch in first["whole"][0].training()]
    assert all(abs(loss - 1 / 6) < 0.1 for loss in losses)  # of numbers drawn from [0, 1/3)

    # on one process, what two have summed is not lost
    course, _ = train(Drawing(), tmp_path / "left")
    assert course.training()[0]["loss"] == losses[0]
    assert 0 < course.training()[1]["loss"] < 1 / 3


def _on_two_processes(folder: Path) -> dict:
    whole = train(Drawing(), folder / "whole")
    stopped = []
    for stop in ((0, 1, 2), (1, 0, BATCHES - 1), (1, 1, BATCHES)):  # in a step, an epoch's last one, and in validation
        out = folder / "-".join(map(str, stop))
        code = _exit_code(stop, out)
        stopped.append((code, train(Drawing(), out)))
    _exit_code((0, 1, 2), folder / "left")
    often = train(Drawing(), folder / "often", checkpoint_minutes=0, checkpoint_batches=2)
    return {"whole": whole, "stopped": stopped, "often": often, "agreed": _agree()}


def _exit_code(stop: tuple[int, int, int], folder: Path) -> int:
    with pytest.raises(PreemptedError) as error:
        train(Drawing(stop), folder)
    return error.value.exit_code


def _agree() -> list[Wish]:
    wishes = [[Wish.SAVE, Wish.GO_ON, Wish.GO_ON, Wish.STOP], [Wish.GO_ON, Wish.GO_ON, Wish.FAIL, Wish.GO_ON]]
    agreement = Agreement(2)
    agreed = [agreement.next(wish) for wish in wishes[dist.get_rank()]]
    return [*agreed, agreement.last(Wish.SAVE)]


def test_in_another_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with catch_signals() as signals:
            seen.append((signal.getsignal(signal.SIGTERM) is before, signals.caught))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(True, None)]


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catch_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.caught is None
    finally:
        signal.signal(signal.SIGHUP, before)
