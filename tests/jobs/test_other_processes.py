"""A run that goes on with another number of processes than it began with."""

import dataclasses
import json
from contextlib import suppress

import pytest

from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.jobs import train_ranker, train_tokenizer
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.training import RankerTraining
from sidrec_torchrec.training.checkpoints import LAST, Checkpoints

EVERY = 2  # batches to a checkpoint


class Killed(Exception):
    pass


def train(config: TrainRankerConfig, killed: bool) -> tuple[dict, list[int]]:
    """The result, and the targets of each batch trained on; if it is killed, once it has its second checkpoint, no result."""
    steps, save, trained, saves = RankerTraining.steps, Checkpoints.save, [], []

    def noted(self, *arguments):
        for step in steps(self, *arguments):
            trained.append(step.amount)
            yield step

    def save_then_die(self, name, state):
        save(self, name, state)
        saves.append(name)
        if killed and saves.count(LAST) == 2:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankerTraining, "steps", noted)
        patch.setattr(Checkpoints, "save", save_then_die)
        try:
            return train_ranker.main(config), trained
        except Killed:
            return {}, trained


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_each_event_is_trained_on_once_and_the_result_is_that_of_one(
    first, then, corpus, prepared, tmp_path, run_distributed
):
    """Without dropout the same up to rounding, for batches are the same whatever the number of processes."""

    def config(name: str) -> TrainRankerConfig:
        return TrainRankerConfig(
            data=corpus,
            prepared=prepared,
            out=tmp_path / name,
            arm="id",
            epochs=2,
            batch_events=1024,
            checkpoint_batches=EVERY,
            model=RankerConfig(dim=64, num_heads=2, head_dims=(16, 8), dropout=0.0),
            arm_options=ArmConfig(table_dim=16, table_dropout=0),
        )

    def run(processes: int, killed: bool) -> tuple[dict, list[int]]:
        if processes == 1:
            return train(config("run"), killed)
        return run_distributed(train, processes, config("run"), killed)[0]

    whole, _ = train(config("whole"), killed=False)
    (_, before), (result, after) = run(first, killed=True), run(then, killed=False)
    counts = json.loads((prepared / "prepared.json").read_text())["counts"]
    assert len(before) == 2 * EVERY
    assert sum(before) + sum(after) == 2 * counts["train"]["targets"]
    assert result["train_loss"] == pytest.approx(whole["train_loss"], abs=1e-4)
    for name in ("ne_all", "ne_warm", "ne_cold"):
        assert result["test"][name] == pytest.approx(whole["test"][name], abs=1e-4)
    checkpoint = tmp_path / "run" / "checkpoints" / LAST
    assert len([*checkpoint.glob("*.safetensors")]) <= then  # none of the processes that are no more


def whole_and_killed(ranker: TrainRankerConfig, tokenizer: TrainTokenizerConfig) -> list[tuple[list, list]]:
    """Losses and results of a whole run, and of one that was killed and went on; of both jobs."""
    both = []
    for job, config, told in (
        (train_ranker, ranker, ("train_loss", "test")),
        (train_tokenizer, tokenizer, ("course", "validation")),
    ):
        whole = job.main(config)
        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            patch.setattr(Checkpoints, "save", second_kills(Checkpoints.save))
            job.main(dataclasses.replace(config, out=config.out / "killed"))
        went_on = job.main(dataclasses.replace(config, out=config.out / "killed"))
        both.append(tuple([result[name] for name in told] for result in (whole, went_on)))
    return both


def second_kills(save):
    saves = []

    def save_then_die(self, name, state):
        save(self, name, state)
        saves.append(name)
        if len(saves) == 2:
            raise Killed

    return save_then_die


def test_of_three_processes_each_sum_is_added_up_as_before(corpus, prepared, tmp_path, run_distributed):
    """With two the order of adding does not matter, and with one there is none."""
    ranker = TrainRankerConfig(
        data=corpus,
        prepared=prepared,
        out=tmp_path / "ranker",
        arm="none",
        epochs=2,
        batch_events=1024,
        checkpoint_batches=EVERY,
        model=RankerConfig(dim=16, num_heads=2, head_dims=(16, 8)),
    )
    tokenizer = TrainTokenizerConfig(
        data=corpus,
        out=tmp_path / "tokenizer",
        epochs=2,
        batch_size=24,
        model=VQFusionOptions(latent_dim=16, quantizer=QuantizerConfig(stages="ternary*6")),
    )
    for results in run_distributed(whole_and_killed, 3, ranker, tokenizer):
        for whole, went_on in results:
            assert went_on == whole
