"""The tuning job: SIDs that rank better; resumed, in two processes, and refused where it cannot work."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.errors import CodecMismatchError, DataError, RunMismatchError
from sidrec_torchrec.fusion.config import VQFusionOptions
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import encode_corpus, tune_tokenizer
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig
from sidrec_torchrec.jobs.train_tokenizer import main as train_tokenizer
from sidrec_torchrec.jobs.tune_tokenizer import TuneTokenizerConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.training.checkpoints import Checkpoints

TOKENIZER = VQFusionOptions(latent_dim=16, dropout=0.0, prefix_share=0.0)
SMALL = RankerConfig(dim=64, num_heads=2, head_dims=(16, 8), dropout=0.0)


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without dropout, of two sources and two targets: one class, several classes."""
    out = tmp_path_factory.mktemp("trained")
    config = TrainTokenizerConfig(data=corpus, out=out, target=("category", "tags"), epochs=2, model=TOKENIZER)
    train_tokenizer(config)
    return out


def make_config(corpus: Path, prepared: Path, trained: Path, out: Path, **changes) -> TuneTokenizerConfig:
    config = TuneTokenizerConfig(
        data=corpus,
        prepared=prepared,
        tokenizer=trained,
        out=out,
        epochs=2,
        batch_events=1024,
        model=SMALL,
        digit_dropout=0.0,
        tokenizer_dropout=0.0,
    )
    return dataclasses.replace(config, **changes)


def test_a_tuned_tokenizer_is_one_of_its_own(corpus, prepared, trained, tmp_path):
    config = make_config(corpus, prepared, trained, tmp_path / "tuned")
    result = tune_tokenizer.main(config)
    assert result["train_loss"][-1] < result["train_loss"][0]
    assert len(result["validation"]) == 2
    assert result["before"] == Tokenizer.load(trained / "tokenizer").codec.spec.fingerprint != result["fingerprint"]
    assert not (config.out / "items").exists()  # needed in training only
    assert tune_tokenizer.main(config) == result  # read back

    sids = {}
    for name, folder in (("before", trained), ("after", config.out)):
        encode = encode_corpus.EncodeCorpusConfig(data=corpus, tokenizer=folder, out=tmp_path / name, report="full")
        encode_corpus.main(encode)
        sids[name] = read_sids(encode.out, Codec.load(encode.out / "codec"))[1]
    assert (sids["before"] != sids["after"]).any()
    with pytest.raises(CodecMismatchError):
        read_sids(tmp_path / "before", Codec.load(tmp_path / "after" / "codec"))
    with pytest.raises(RunMismatchError, match="own_weight"):
        tune_tokenizer.main(dataclasses.replace(config, own_weight=0.5))


def test_its_own_loss_keeps_what_items_are(corpus, prepared, trained, tmp_path):
    """Without it, labels alone pull at the codes, and the sources are forgotten."""
    errors = {}
    for weight in (0.0, 1.0):
        config = make_config(corpus, prepared, trained, tmp_path / f"{weight}", own_weight=weight, epochs=4)
        tune_tokenizer.main(config)
        encode = encode_corpus.EncodeCorpusConfig(
            data=corpus, tokenizer=config.out, out=tmp_path / f"sids-{weight}", report="full"
        )
        errors[weight] = encode_corpus.main(encode)["reconstruction"]["text_emb"][-1]
    assert errors[1.0] < 0.95 * errors[0.0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return Tokenizer.load(folder / "tokenizer").model.state_dict()


def test_resumed_as_uninterrupted(corpus, prepared, trained, tmp_path, monkeypatch):
    changes = {"checkpoint_batches": 2, "digit_dropout": 0.1, "tokenizer_dropout": 0.5}
    whole = make_config(corpus, prepared, trained, tmp_path / "whole", **changes)
    tune_tokenizer.main(whole)
    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    save, saves = Checkpoints.save, []

    def interrupted(self, name, state):
        save(self, name, state)
        saves.append(name)
        if len(saves) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", interrupted)
        tune_tokenizer.main(cut)
    assert not (cut.out / "tokenizer").exists()
    tune_tokenizer.main(cut)
    for name, value in weights(whole.out).items():
        torch.testing.assert_close(weights(cut.out)[name], value, rtol=0, atol=0)


def tune_here(config: TuneTokenizerConfig) -> dict:
    return tune_tokenizer.main(config)


def test_two_processes_equal_one(corpus, prepared, trained, tmp_path, run_distributed):
    """Same batches of events and of items, so the same tokenizer, up to rounding: dropout is off here."""
    one = tune_tokenizer.main(make_config(corpus, prepared, trained, tmp_path / "one", epochs=1))
    results = run_distributed(tune_here, 2, make_config(corpus, prepared, trained, tmp_path / "two", epochs=1))
    assert results[0] == results[1]
    # a digit that lies on an edge may fall to the other side, so not 1e-6
    assert results[0]["validation"][0]["ne_all"] == pytest.approx(one["validation"][0]["ne_all"], abs=5e-3)
    assert results[0]["train_loss"] == pytest.approx(one["train_loss"], abs=5e-3)


def test_predicted_sources_come_from_the_content_folder(corpus, prepared, tmp_path):
    table = pq.read_table(corpus / "items.parquet")
    content = tmp_path / "content"
    content.mkdir()
    pq.write_table(table.append_column("taste", table["image_emb"]), content / "items.parquet")
    train = TrainTokenizerConfig(
        data=content, out=tmp_path / "t", predict=("taste",), epochs=1, model=VQFusionOptions(latent_dim=16)
    )
    train_tokenizer(train)
    config = make_config(corpus, prepared, train.out, tmp_path / "tuned", epochs=1)
    with pytest.raises(DataError, match="no source 'taste'"):
        tune_tokenizer.main(config)
    tune_tokenizer.main(dataclasses.replace(config, content=content, out=tmp_path / "tuned-2"))
    reordered = tmp_path / "reordered"
    reordered.mkdir()
    rows = np.arange(len(table))[::-1]
    pq.write_table(table.append_column("taste", table["image_emb"]).take(rows), reordered / "items.parquet")
    with pytest.raises(DataError, match="in another order"):
        tune_tokenizer.main(dataclasses.replace(config, content=reordered, out=tmp_path / "tuned-3"))


def test_codes_cannot_be_tuned_through(corpus, prepared, trained, tmp_path):
    with pytest.raises(ValueError, match="codes have no gradient"):
        make_config(corpus, prepared, trained, tmp_path, model=dataclasses.replace(SMALL, attention="codes"))
