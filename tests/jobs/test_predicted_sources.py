"""Training with predicted sources, and encoding items that lack them."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.collaborative import CollaborativeConfig
from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.fusion.config import VQFusionOptions
from sidrec_torchrec.jobs import collaborative_vectors, encode_corpus, train_tokenizer
from sidrec_torchrec.jobs.collaborative_vectors import CollaborativeVectorsConfig
from sidrec_torchrec.jobs.encode_corpus import EncodeCorpusConfig
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig

SMALL = VQFusionOptions(latent_dim=8)


def test_the_jobs_train_with_them_and_encode_without(corpus: Path, tmp_path):
    """A new day's items lack the column: their SIDs are those of the same items with it."""
    table = pq.read_table(corpus / "items.parquet")
    text_ND = np.array(table["text_emb"].to_pylist(), dtype=object)
    tastes = [None if row is None else row[:3] for row in text_ND]
    with_tastes = tmp_path / "data"
    with_tastes.mkdir()
    column = pa.array(tastes, pa.list_(pa.float32()))
    pq.write_table(table.append_column("tastes", column), with_tastes / "items.parquet")
    train = TrainTokenizerConfig(
        data=with_tastes, out=tmp_path / "t", predict=("tastes",), target=("category",), epochs=6, model=SMALL
    )
    result = train_tokenizer.main(train)
    assert (
        result["validation"]["reconstruction"]["tastes"][-1] < 0.9 * result["validation"]["reconstruction"]["tastes"][0]
    )
    words = {}
    for data in (with_tastes, corpus):
        out = tmp_path / f"sids-of-{data.name}"
        report = encode_corpus.main(EncodeCorpusConfig(data=data, tokenizer=train.out, out=out, report="full"))
        assert ("tastes" in report["reconstruction"]) == (data == with_tastes)
        words[data] = read_sids(out, Codec.load(out / "codec"))[1]
    np.testing.assert_array_equal(words[with_tastes], words[corpus])
    bare = tmp_path / "bare"
    bare.mkdir()
    pq.write_table(table.drop_columns(["category"]), bare / "items.parquet")
    report = encode_corpus.main(
        EncodeCorpusConfig(data=bare, tokenizer=train.out, out=tmp_path / "bare-sids", report="full")
    )
    assert not report["accuracy"] and not report["target_loss"]
    with pytest.raises(DataError, match="no source 'text_emb'|no source"):
        pq.write_table(table.drop_columns(["text_emb"]), bare / "items.parquet")
        encode_corpus.main(EncodeCorpusConfig(data=bare, tokenizer=train.out, out=tmp_path / "no-sids", report="full"))


def test_mistakes_are_named(corpus: Path, tmp_path):
    config = TrainTokenizerConfig(data=corpus, out=tmp_path / "t", predict=("tastes",))
    with pytest.raises(DataError, match="no source 'tastes'; available"):
        train_tokenizer.main(config)
    with pytest.raises(ValueError, match="both sources to fuse and to predict"):
        dataclasses.replace(config, source=("tastes",))


def test_collaborative_vectors_are_added_to_the_items(corpus: Path, prepared: Path, tmp_path):
    config = CollaborativeVectorsConfig(
        data=corpus, prepared=prepared, out=tmp_path / "out", vectors=CollaborativeConfig(dim=6, least_events=10)
    )
    result = collaborative_vectors.main(config)
    before, after = (pq.read_table(folder / "items.parquet") for folder in (corpus, config.out))
    assert after.drop_columns(["collaborative"]).equals(before)
    cold = set(pq.read_table(prepared / "cold_items.parquet")["item_id"].to_pylist())
    has_N = np.array(after["collaborative"].is_valid())
    assert 0 < has_N.sum() == result["with_vector"] < result["items"] == len(before)
    assert not any(
        item_id in cold for item_id in after["item_id"].to_numpy()[has_N]
    )  # what is tested was not looked at
    assert open_items(config.out, sources=["collaborative"]).source_dims == {"collaborative": 6}
    assert collaborative_vectors.main(config) == result
    train = TrainTokenizerConfig(data=config.out, out=tmp_path / "t", predict=("collaborative",), epochs=1, model=SMALL)
    assert "collaborative" in train_tokenizer.main(train)["validation"]["reconstruction"]
    with pytest.raises(DataError, match="there is a column 'text_emb' already; rename it, or name another"):
        collaborative_vectors.main(dataclasses.replace(config, out=tmp_path / "other", column="text_emb"))
    with pytest.raises(DataError, match="not the items that .* was prepared from"):
        collaborative_vectors.main(dataclasses.replace(config, data=config.out, out=tmp_path / "again", column="more"))
