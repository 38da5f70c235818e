"""Jobs that refresh a tokenizer: published SIDs stay, readers read on; and rankers that start from trained ones."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.sids import read_sids, write_sids
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
        epochs=6,
        learning_rate=5e-3,
        batch_size=16,
        model=TOKENIZER,
        init=old.tokenizer,
        keep=old.published,
        keep_weight=10.0,
        seed=1,
    )
    return dataclasses.replace(config, **changes)


def ranker_config(corpus: Path, prepared: Path, sids: Path, out: Path, **changes) -> TrainRankerConfig:
    config = TrainRankerConfig(
        data=corpus, prepared=prepared, out=out, sids=(sids,), epochs=2, batch_events=1024, model=SMALL
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
    for source in ("text_emb", "image_emb"):
        assert last[source] < first[source]
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
    words = {}
    for weight in (0.0, 10.0):
        config = tune_config(corpus, prepared, old, tmp_path / f"{weight}", keep_weight=weight)
        result = tune_tokenizer.main(config)
        words[weight] = encode(corpus, config.out, tmp_path / f"sids-{weight}")
        assert result["before"] == result["fingerprint"] != result["encoding"]
        assert result["kept"] == {"items": 80, "changed": pytest.approx(changed(old, words[weight]))}
    assert changed(old, words[0.0]) > 0.5
    assert changed(old, words[10.0]) < 0.2
    assert (words[10.0][80:] != read_sids(old.sids, old.codec)[1][80:]).any()

    # the folder that the ranker reads is written anew, by the refreshed tokenizer: it is the same codec
    folder = tmp_path / "served"
    encode(corpus, old.tokenizer, folder)
    train_ranker.main(ranker_config(corpus, prepared, folder, tmp_path / "ranker"))
    before = evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "ranker"))
    item_ids, _ = read_sids(folder, old.codec)
    write_sids(folder / "sids.parquet", old.codec.spec, [(item_ids, words[10.0])])
    after = evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "ranker"))
    assert before["ne_all"] != after["ne_all"] == pytest.approx(before["ne_all"], abs=0.1)


def start(corpus: Path, prepared: Path, old: Old, out: Path, **changes) -> TrainRankerConfig:
    """A trained ranker."""
    config = ranker_config(corpus, prepared, old.sids, out, **changes)
    train_ranker.main(config)
    return config


def still(config: TrainRankerConfig, ranker: Path, out: Path, **changes) -> TrainRankerConfig:
    """Started from the ranker, and trained without a step: rates are 0."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.0, table_learning_rate=0.0)
    return dataclasses.replace(config, init=ranker, out=out, epochs=1, seed=7, optimizer=optimizer, **changes)


@pytest.mark.parametrize("arm", ["side", "learned-side", "hybrid", "id"])
def test_a_ranker_starts_from_the_best_weights_of_another(arm, corpus, prepared, old, tmp_path):
    config = start(corpus, prepared, old, tmp_path / "first", arm=arm)
    first = evaluate.main(evaluate.EvaluateConfig(ranker=config.out))
    second = train_ranker.main(still(config, config.out, tmp_path / "second"))["test"]
    assert second == pytest.approx(first, rel=1e-6)
    # and is a ranker like any other
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "second")) == second


def test_a_ranker_goes_on_from_there(corpus, prepared, old, tmp_path):
    config = start(corpus, prepared, old, tmp_path / "first")
    longer = dataclasses.replace(config, init=config.out, out=tmp_path / "second", epochs=1)
    anew = dataclasses.replace(config, out=tmp_path / "third", epochs=1)
    losses = [train_ranker.main(each)["train_loss"][0] for each in (longer, anew)]
    assert losses[0] < losses[1]


def test_weights_that_would_mean_something_else_are_refused(corpus, prepared, old, sids, tmp_path):
    config = start(corpus, prepared, old, tmp_path / "first")

    def refused(match: str, error: type = SidrecError, **changes) -> None:
        with pytest.raises(error, match=match):
            train_ranker.main(still(config, config.out, tmp_path / "refused", **changes))

    wider = dataclasses.replace(SMALL, dim=32)
    refused(r"'.*' is \[.*32.*\] here and is \[.*16.*\] in it", model=wider)
    refused("is none of its weights", model=dataclasses.replace(SMALL, learned_queries=1))
    refused("its arm is 'side', not 'hybrid'", arm="hybrid")
    refused("its SIDs are of codec", sids=(sids["side"],))


def test_rows_of_other_values_and_items_are_refused(corpus, prepared, old, tmp_path):
    from sidrec_torchrec.data.prepare import PrepareConfig, prepare

    protocol = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("items.parquet", "events.parquet"):
        (other / name).symlink_to(corpus / name)
    users = pq.read_table(corpus / "users.parquet")
    column = next(name for name in users.column_names if name != "user_id")
    values = [f"{value} renamed" for value in users[column].to_pylist()]
    users = users.set_column(users.column_names.index(column), column, [values])
    pq.write_table(users, other / "users.parquet")
    prepare(other, tmp_path / "sequences", protocol)
    config = start(corpus, prepared, old, tmp_path / "first")
    changes = {"data": other, "prepared": tmp_path / "sequences"}
    with pytest.raises(SidrecError, match=f"its user feature '{column}' has other values"):
        train_ranker.main(still(config, config.out, tmp_path / "refused", **changes))

    reordered = tmp_path / "reordered"
    reordered.mkdir()
    items = pq.read_table(corpus / "items.parquet")
    pq.write_table(items.take(np.arange(len(items))[::-1]), reordered / "items.parquet")
    for name in ("events.parquet", "users.parquet"):
        (reordered / name).symlink_to(corpus / name)
    prepare(reordered, tmp_path / "reordered-sequences", protocol)
    config = start(corpus, prepared, old, tmp_path / "ids", arm="id")
    changes = {"data": reordered, "prepared": tmp_path / "reordered-sequences"}
    with pytest.raises(SidrecError, match="rows of the arm 'id' belong to items, and its items are others"):
        train_ranker.main(still(config, config.out, tmp_path / "refused", **changes))
