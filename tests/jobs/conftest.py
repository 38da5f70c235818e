"""A small corpus and its prepared sequences, made once for all job tests."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.jobs import encode_corpus, train_tokenizer
from tests.s3 import s3, s3_port  # noqa: F401


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder of 120 items and 60 users."""
    folder = tmp_path_factory.mktemp("corpus")
    config = SyntheticConfig(
        items=120, users=60, median_events=40, max_events=120, categories=4, text_dim=12, image_dim=8
    )
    write_synthetic(config, folder)
    return folder


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its sequences, short rows so that there are several a user."""
    folder = tmp_path_factory.mktemp("prepared") / "sequences"
    config = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2)
    prepare(corpus, folder, config)
    return folder


@pytest.fixture(scope="session")
def labeled(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus with a second label: rarer, correlated, and null for a third of the events."""
    folder = tmp_path_factory.mktemp("labeled")
    for name in ("items.parquet", "users.parquet"):
        (folder / name).symlink_to(corpus / name)
    events = pq.read_table(corpus / "events.parquet")
    draw_N = np.random.default_rng(0).random((2, len(events)))
    like = pa.array((events["label"].to_numpy() * (draw_N[0] < 0.6)).astype(np.int8), mask=draw_N[1] < 1 / 3)
    pq.write_table(events.append_column("like", like), folder / "events.parquet")
    return folder


@pytest.fixture(scope="session")
def sequences(labeled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "sequences"
    config = PrepareConfig(
        max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2, tasks=("label", "like")
    )
    prepare(labeled, folder, config)
    return folder


@pytest.fixture(scope="session")
def sids(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Encoded corpora: ``side`` (both sources, ternary) and ``text`` (one source, residual)."""
    folder = tmp_path_factory.mktemp("sids")
    for name, sources, quantizer in (
        ("side", (), QuantizerConfig(stages="ternary*10")),
        ("text", ("text_emb",), QuantizerConfig(kind="rq", stages="onehot:8*2")),
    ):
        train = train_tokenizer.TrainTokenizerConfig(
            data=corpus,
            out=folder / "tokenizers" / name,
            source=sources,
            epochs=1,
            model=VQFusionOptions(quantizer=quantizer, latent_dim=16),
        )
        train_tokenizer.main(train)
        encode_corpus.main(
            encode_corpus.EncodeCorpusConfig(data=corpus, tokenizer=train.out, out=folder / name, report="full")
        )
    return {name: folder / name for name in ("side", "text")}
