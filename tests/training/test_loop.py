"""The training loop on a model of one number: the best epoch, patience, resuming, and training that diverges."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from sidrec_torchrec.errors import DivergedError
from sidrec_torchrec.training.checkpoints import Checkpoints
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.loop import Loop, LoopConfig
from sidrec_torchrec.training.schedule import rate_factor
from sidrec_torchrec.training.trackers import Trackers
from sidrec_torchrec.training.trainee import Step, Trainee


class Rate:
    """An optimizer's schedule, without a state."""

    def __init__(self) -> None:
        self.progress: list[float] = []

    def set_progress(self, progress: float) -> None:
        self.progress.append(progress)

    def state_dict(self) -> dict:
        return {}

    def state_to_load(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

    def measures(self) -> dict[str, float]:
        return {"gradient_norm": 1.0, "learning_rate": 0.5}


class Counting(Trainee):
    """Each of four batches adds 1 to the weight, and draws a number; an epoch's score is given."""

    name, losses, epoch_size = "counting", ("loss",), 4

    def __init__(self, scores: list[float | None], nan_at: int | None = None) -> None:
        self.model = nn.Linear(1, 1)
        nn.init.zeros_(self.model.weight)
        self.optimizer = Rate()
        self.scores, self.nan_at, self.seeds, self.drawn = scores, nan_at, [], []

    def steps(self, epoch, first, before_step):
        for batch in range(first, 4):
            before_step()
            self.drawn.append((epoch, batch, float(torch.rand(()))))
            with torch.no_grad():
                self.model.weight += 1
            loss = math.nan if (epoch, batch) == (self.nan_at, 2) else float(batch)
            yield Step(1, torch.tensor([loss]), torch.ones(1))

    def batch(self, epoch, number):
        return {"values": np.array([epoch, number])}

    def seed(self, epoch, batch):
        torch.manual_seed(10 * epoch + batch)

    def validate(self, progress):
        return {"score": self.scores[int(self.model.weight) // 4 - 1]}

    def score(self, values):
        return values["score"]

    def total(self, losses):
        return losses["loss"]


def train(trainee: Counting, folder, **changes):
    with process_group() as processes:
        return Loop(trainee, LoopConfig(epochs=len(trainee.scores), **changes), folder, processes, Trackers()).run()


def test_the_best_epoch_is_kept(tmp_path):
    trainee = Counting([0.5, 0.3, 0.4])
    course = train(trainee, tmp_path)
    assert course.best == 1 and int(trainee.model.weight) == 8  # after two epochs of four batches
    assert [epoch["score"] for epoch in course.validation()] == [0.5, 0.3, 0.4]
    assert course.training() == [{"loss": 1.5}] * 3
    assert trainee.optimizer.progress == pytest.approx([i / 12 for i in range(12)])


def test_without_a_score_the_last_epoch_is_kept(tmp_path, capsys):
    trainee = Counting([None, None])
    assert train(trainee, tmp_path).best == 1 and int(trainee.model.weight) == 8
    assert "no validation target tells which epoch is best; the last, 2, is kept" in capsys.readouterr().err


def test_an_epoch_without_a_score_is_not_the_best(tmp_path):
    assert train(Counting([0.4, None, 0.5]), tmp_path).best == 0


def test_patience_ends_training(tmp_path):
    assert len(train(Counting([0.5, 0.6, 0.7, 0.1]), tmp_path, patience=2).epochs) == 3


def test_training_that_diverges_keeps_the_last_good_epoch(tmp_path):
    with pytest.raises(
        DivergedError, match=r"diverged in epoch 2, batch 3 \(a loss is not finite\).*the best epoch"
    ) as error:
        train(Counting([0.5, 0.3, 0.1], nan_at=1), tmp_path)
    (path,) = tmp_path.glob("diverged-*.npz")
    assert f"numpy.load('{path}')" in str(error.value)
    assert np.load(path)["values"].tolist() == [1, 2]  # the third batch of the second epoch
    again = Counting([0.5, 0.3, 0.1])
    assert train(again, tmp_path).best == 2  # goes on after the epoch before
    assert again.drawn[0][:2] == (1, 0)


def test_nan_that_a_checkpoint_would_keep_is_refused(tmp_path):
    with pytest.raises(DivergedError, match="epoch 2, batch 3"):
        train(Counting([0.5, 0.3, 0.1], nan_at=1), tmp_path, checkpoint_minutes=0)
    again = Counting([0.5, 0.3, 0.1])
    train(again, tmp_path)
    assert again.drawn[0][:2] == (1, 2)  # goes on at the batch that failed


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_no_epoch_to_keep(tmp_path, score):
    with pytest.raises(DivergedError, match=f"epoch 2, batch 4 .validation after it: its score is {score}"):
        train(Counting([0.5, score, 0.1]), tmp_path)
    trainee = Counting([0.5])
    assert train(trainee, tmp_path).best == 0 and int(trainee.model.weight) == 4


def test_on_two_processes_both_end_at_the_batch_that_one_saw(run_distributed, tmp_path):
    both = run_distributed(_diverge, 2, tmp_path)
    assert all("diverged in epoch 2, batch 3" in text for text in both)
    assert len(list(tmp_path.glob("diverged-*-process-[01].npz"))) == 2


def _diverge(folder: Path) -> str:
    only_here = dist.get_rank() == 1
    with pytest.raises(DivergedError) as error:
        train(Counting([0.5, 0.3, 0.1], nan_at=1 if only_here else None), folder)
    return str(error.value)


@pytest.mark.parametrize("killed_after", range(1, 9))
def test_a_killed_run_ends_as_a_whole_one(killed_after, tmp_path, monkeypatch):
    whole = Counting([0.5, 0.3, 0.4])
    course = train(whole, tmp_path / "whole", checkpoint_batches=2)
    save, saves = Checkpoints.save, []

    def save_then_die(self, name, state):
        save(self, name, state)
        saves.append(name)
        if len(saves) == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", save_then_die)
        train(Counting([0.5, 0.3, 0.4]), tmp_path / "killed", checkpoint_batches=2)
    resumed = Counting([0.5, 0.3, 0.4])
    again = train(resumed, tmp_path / "killed", checkpoint_batches=2)
    assert again.epochs == course.epochs and again.best == course.best
    assert resumed.drawn == whole.drawn[len(whole.drawn) - len(resumed.drawn) :]


def test_the_rate_rises_then_falls():
    factors = [rate_factor(p / 100, warmup=0.1, decay_from=0.1) for p in range(101)]
    assert factors[5] == pytest.approx(0.5) and factors[10] == 1 and factors[100] == pytest.approx(0)
    assert factors[55] == pytest.approx(0.5)
    early = [rate_factor(p / 100, warmup=0.1, decay_from=0.0) for p in range(101)]
    assert early[50] == pytest.approx(0.5) and max(early) < 1
