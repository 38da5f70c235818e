"""Jobs that refresh a tokenizer: published SIDs stay, and rankers in production read on."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.errors import CodecMismatchError, RunMismatchError, SidrecError
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import encode_corpus, evaluate, train_ranker, train_tokenizer, tune_tokenizer
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig
from sidrec_torchrec.jobs.tune_tokenizer import TuneTokenizerConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.training.checkpoints import Checkpoints

SMALL = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), dropout=0.0)
TOKENIZER = VQFusionOptions(latent_dim=16, hidden_dim=16, dropout=0.0, quantizer=QuantizerConfig(stages="ternary*10"))


@dataclasses.dataclass(frozen=True)
class Old:
    """What is in production: a tokenizer of 80 of the 120 items, its SIDs of them, and those of all."""

    tokenizer: Path
    published: Path
    sids: Path
    codec: Codec


@pytest.fixture(scope="module")
def old(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Old:
    folder = tmp_path_factory.mktemp("old")
    table = pq.read_table(corpus / "items.parquet")
    (folder / "items").mkdir()
    pq.write_table(table.slice(0, 80), folder / "items" / "items.parquet")
    config = TrainTokenizerConfig(
        data=folder / "items", out=folder / "t", target=("category",), epochs=2, model=TOKENIZER, batch_size=16
    )
    train_tokenizer.main(config)
    for name, data in (("published", folder / "items"), ("sids", corpus)):
        encode(data, config.out, folder / name)
    return Old(config.out, folder / "published", folder / "sids", Codec.load(folder / "published"))


def encode(data: Path, tokenizer: Path, out: Path) -> np.ndarray:
    """The packed SIDs."""
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tokenizer, out=out))
    return read_sids(out, Codec.load(out))[1]


def refresh_config(corpus: Path, old: Old, out: Path, **changes) -> TrainTokenizerConfig:
    config = TrainTokenizerConfig(
        data=corpus,
        out=out,
        target=("category",),
        epochs=4,
        learning_rate=5e-3,
        batch_size=16,
        model=TOKENIZER,
        init=old.tokenizer,
        keep=old.published,
        keep_weight=10.0,
        seed=1,
    )
    return dataclasses.replace(config, **changes)


def changed(old: Old, words_NW: np.ndarray) -> float:
    """Share of the published items of which some digit is another one; they are the first 80."""
    return float((words_NW[:80] != read_sids(old.published, old.codec)[1]).any(1).mean())


def test_a_refresh_keeps_what_is_published_and_learns_the_rest(corpus, old, tmp_path):
    results, words = {}, {}
    for weight in (0.0, 10.0):
        config = refresh_config(corpus, old, tmp_path / f"{weight}", keep_weight=weight)
        results[weight] = train_tokenizer.main(config)
        words[weight] = encode(corpus, config.out, tmp_path / f"sids-{weight}")
        assert results[weight]["fingerprint"] == old.codec.spec.fingerprint != results[weight]["encoding"]
        assert results[weight]["kept"] == {"items": 80, "changed": pytest.approx(changed(old, words[weight]))}
    assert changed(old, words[0.0]) > 0.5  # the codec alone does not keep them
    assert changed(old, words[10.0]) < 0.1
    assert (words[10.0][80:] != read_sids(old.sids, old.codec)[1][80:]).any()
    first, *_, last = results[10.0]["course"]  # at first nothing has moved, but much lies within the margin
    assert last["moved"] < 0.5 * first["moved"]
    tasks = [epoch["total"] - 10 * epoch["moved"] for epoch in (first, last)]
    assert tasks[1] < 0.95 * tasks[0]
    assert train_tokenizer.main(refresh_config(corpus, old, tmp_path / "10.0")) == results[10.0]  # read back


def test_a_start_without_an_epoch_is_the_old_tokenizer(corpus, old, tmp_path):
    for name, keep in (("codec-too", None), ("kept", old.published)):
        config = refresh_config(corpus, old, tmp_path / name, epochs=0, keep=keep)
        assert train_tokenizer.main(config)["encoding"] == old.codec.spec.fingerprint
        assert np.array_equal(encode(corpus, config.out, tmp_path / f"sids-{name}"), read_sids(old.sids, old.codec)[1])


def test_without_keep_the_codec_is_another(corpus, old, tmp_path):
    result = train_tokenizer.main(refresh_config(corpus, old, tmp_path / "t", keep=None))
    assert result["fingerprint"] == result["encoding"] != old.codec.spec.fingerprint
    assert "kept" not in result


def test_interrupted_it_goes_on(corpus, old, tmp_path, monkeypatch):
    whole = refresh_config(corpus, old, tmp_path / "whole", epochs=3)
    train_tokenizer.main(whole)
    save, saves = Checkpoints.save, []

    def interrupted(self, name, state):
        save(self, name, state)
        saves.append(name)
        if len(saves) == 4:
            raise KeyboardInterrupt

    cut = dataclasses.replace(whole, out=tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", interrupted)
        train_tokenizer.main(cut)
    train_tokenizer.main(cut)
    own, its = (Tokenizer.load(config.out).model.state_dict() for config in (whole, cut))
    assert all(torch.equal(own[name], its[name]) for name in own)


def refresh_here(config: TrainTokenizerConfig) -> dict:
    return train_tokenizer.main(config)


def test_two_processes_equal_one(corpus, old, tmp_path, run_distributed):
    one = train_tokenizer.main(refresh_config(corpus, old, tmp_path / "one", epochs=1))
    results = run_distributed(refresh_here, 2, refresh_config(corpus, old, tmp_path / "two", epochs=1))
    assert results[0] == results[1]
    assert results[0]["kept"]["items"] == one["kept"]["items"] == 80
    for epoch, expected in zip(results[0]["course"], one["course"], strict=True):
        # only what is decoded from random prefixes differs: not in validation
        assert epoch["moved"] == pytest.approx(expected["moved"], rel=0.2, abs=0.02)


def test_what_cannot_be_kept_is_refused(corpus, old, sids, tmp_path):
    with pytest.raises(ValueError, match="keep needs init"):
        refresh_config(corpus, old, tmp_path, init=None)
    with pytest.raises(ValueError, match="margin"):
        refresh_config(corpus, old, tmp_path, keep_margin=0.5)
    with pytest.raises(CodecMismatchError, match="made with codec"):
        train_tokenizer.main(refresh_config(corpus, old, tmp_path / "a", keep=sids["side"]))
    wider = dataclasses.replace(TOKENIZER, latent_dim=12)
    with pytest.raises(SidrecError, match="latent_dim is 12, was 16"):
        train_tokenizer.main(refresh_config(corpus, old, tmp_path / "b", model=wider))
    train_tokenizer.main(refresh_config(corpus, old, tmp_path / "c", epochs=0))
    with pytest.raises(RunMismatchError, match="keep_weight"):
        train_tokenizer.main(refresh_config(corpus, old, tmp_path / "c", epochs=0, keep_weight=3.0))


def tune_config(corpus: Path, prepared: Path, old: Old, out: Path, **changes) -> TuneTokenizerConfig:
    config = TuneTokenizerConfig(
        data=corpus,
        prepared=prepared,
        tokenizer=old.tokenizer,
        out=out,
        epochs=6,
        batch_events=512,
        model=SMALL,
        keep=old.published,
        keep_weight=10.0,
    )
    return dataclasses.replace(config, **changes)


def test_a_ranker_in_production_reads_the_sids_of_a_tuned_refresh(corpus, prepared, old, tmp_path):
    config = tune_config(corpus, prepared, old, tmp_path / "refreshed")
    result = tune_tokenizer.main(config)
    words_NW = encode(corpus, config.out, tmp_path / "sids")
    assert result["before"] == result["fingerprint"] != result["encoding"]
    assert result["kept"] == {"items": 80, "changed": pytest.approx(changed(old, words_NW))}
    assert changed(old, words_NW) < 0.2
    assert (words_NW[80:] != read_sids(old.sids, old.codec)[1][80:]).any()

    # the folder that the ranker reads is written anew, by the refreshed tokenizer: it is the same codec
    folder = tmp_path / "served"
    encode(corpus, old.tokenizer, folder)
    reads = {"sids": (folder,), "epochs": 1, "batch_events": 1024, "model": SMALL}
    train_ranker.main(TrainRankerConfig(data=corpus, prepared=prepared, out=tmp_path / "ranker", **reads))
    before = evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "ranker"))
    shutil.rmtree(folder)
    assert (encode(corpus, config.out, folder) == words_NW).all()
    after = evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "ranker"))
    assert before["ne_all"] != after["ne_all"] == pytest.approx(before["ne_all"], abs=0.1)
