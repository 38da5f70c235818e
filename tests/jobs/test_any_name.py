"""Columns of any name, from the data to a ranker's predictions; nothing is written outside the folders given."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import encode_corpus, evaluate, train_ranker, train_tokenizer, tune_tokenizer
from sidrec_torchrec.ranker.config import RankerConfig

SMALL = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8))


@pytest.mark.parametrize(
    ("source", "target", "user"),
    [
        ("../../../out", ".", "a.b"),
        ("a.b", "training", ""),
        ("", "../x", "."),
        ("training", "a/b", "training"),
        (".", "", "/x"),
    ],
)
def test_any_name(source, target, user, corpus, tmp_path):
    data = tmp_path / "deep" / "down" / "data"
    shutil.copytree(corpus, data)
    rename(data / "items.parquet", {"text_emb": source, "category": target})
    rename(data / "users.parquet", {pq.read_schema(data / "users.parquet").names[1]: user})
    before = {path for path in tmp_path.rglob("*") if "deep" not in path.parts}
    folder = tmp_path / "deep" / "down"
    sequences = folder / "prepared" / "sequences"
    prepare(data, sequences, PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2))
    tokenizer = train_tokenizer.TrainTokenizerConfig(
        data=data,
        out=folder / "tokenizer",
        target=(target,),
        epochs=1,
        model=VQFusionOptions(latent_dim=16, quantizer=QuantizerConfig(stages="ternary*10")),
    )
    train_tokenizer.main(tokenizer)
    assert target in Tokenizer.load(tokenizer.out).vocabularies
    tuned = tune_tokenizer.TuneTokenizerConfig(
        data=data, prepared=sequences, tokenizer=tokenizer.out, out=folder / "tuned", epochs=1, model=SMALL
    )
    tune_tokenizer.main(tuned)
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tuned.out, out=folder / "sids"))
    for arm in ("raw", "side"):
        ranker = train_ranker.TrainRankerConfig(
            data=data,
            prepared=sequences,
            out=folder / arm,
            arm=arm,
            sids=(folder / "sids",),
            epochs=1,
            batch_events=2048,
            model=SMALL,
        )
        trained = train_ranker.main(ranker)
        assert evaluate.main(evaluate.EvaluateConfig(ranker=ranker.out)) == trained["test"]
    assert {path for path in tmp_path.rglob("*") if "deep" not in path.parts} == before
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"down"}
    assert {path.name for path in folder.iterdir()} == {"data", "prepared", "tokenizer", "tuned", "sids", "raw", "side"}


def test_sids_of_any_name(corpus, prepared, tmp_path):
    """Several travel under the names of their folders; a module called so would be refused, or hide an attribute."""
    sids = []
    for source, name in (("text_emb", "content-0.1"), ("image_emb", "training")):
        out = tmp_path / source
        model = VQFusionOptions(latent_dim=16, quantizer=QuantizerConfig(kind="rq", stages="onehot:16*3"))
        train_tokenizer.main(
            train_tokenizer.TrainTokenizerConfig(data=corpus, out=out, source=(source,), epochs=0, model=model)
        )
        sids.append(tmp_path / name)
        encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=corpus, tokenizer=out, out=sids[-1]))
    for arm in ("side", "learned-side", "prefix-ngram", "all-ngram", "pieces", "side-pieces"):
        ranker = train_ranker.TrainRankerConfig(
            data=corpus,
            prepared=prepared,
            out=tmp_path / arm,
            arm=arm,
            sids=tuple(sids),
            epochs=1,
            batch_events=4096,
            model=RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), attention="vectors"),
        )
        trained = train_ranker.main(ranker)
        assert evaluate.main(evaluate.EvaluateConfig(ranker=ranker.out)) == trained["test"]


def rename(path: Path, names: dict[str, str]) -> None:
    table = pq.read_table(path)
    pq.write_table(table.rename_columns([names.get(name, name) for name in table.column_names]), path)
