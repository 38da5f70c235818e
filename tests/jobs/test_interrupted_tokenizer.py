"""A tokenizer whose training was interrupted ends as one trained in one go."""

import pytest

from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.jobs import train_tokenizer
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig
from sidrec_torchrec.training.checkpoints import Checkpoints


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "killed_after", [1, 2, 4, 5, 9]
)  # in the start, between the two checkpoints of an epoch, at the end
def test_interrupted_run_goes_on_where_it_was(killed_after, corpus, tmp_path, monkeypatch):
    def config(name: str) -> TrainTokenizerConfig:
        return TrainTokenizerConfig(
            data=corpus,
            out=tmp_path / name,
            target=("category",),
            epochs=4,
            batch_size=32,
            model=VQFusionOptions(latent_dim=16, dropout=0.2, quantizer=QuantizerConfig(stages="ternary*10")),
        )

    whole = train_tokenizer.main(config("whole"))
    save, saves = Checkpoints.save, []

    def save_then_die(self, name, state):
        save(self, name, state)
        saves.append(name)
        if len(saves) == killed_after:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", save_then_die)
        train_tokenizer.main(config("killed"))
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert train_tokenizer.main(config("killed")) == whole
