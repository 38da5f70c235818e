"""Few vectors that are far longer than the rest are told of, by the item that has the longest."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.fusion.lengths import Lengths
from sidrec_torchrec.jobs import train_tokenizer


def lengths_of(x_ND: np.ndarray) -> Lengths:
    lengths = Lengths()
    for part in np.array_split(x_ND, 7):
        lengths.update(torch.from_numpy(part))
    return lengths


@pytest.mark.parametrize(
    ("factors", "are_uneven"),
    [
        ([1.0], False),
        ([1e3], True),
        ([1e3] * 20, True),
        ([60.0], True),
        ([20.0], False),
        ([3.0] * 100, False),
    ],
)
def test_uneven_lengths(factors, are_uneven):
    x_ND = np.random.default_rng(0).normal(size=(500, 16)) / 4
    x_ND[: len(factors)] *= np.array(factors)[:, None]
    lengths = lengths_of(x_ND)
    expected_N = np.linalg.norm(x_ND, axis=1)
    assert lengths.count == 500
    assert lengths.longest == pytest.approx(expected_N.max())
    assert lengths.squares == pytest.approx((expected_N**2).sum())
    assert lengths.are_uneven is are_uneven


def test_lengths_of_ordinary_spread_are_not_told_of():
    draw = np.random.default_rng(0)
    x_ND = draw.normal(size=(5000, 8)) * np.exp(draw.normal(size=(5000, 1)))  # log-normal
    assert not lengths_of(x_ND).are_uneven


def test_the_item_is_named(tmp_path, capsys):
    draw = np.random.default_rng(0)
    x_ND = draw.normal(size=(500, 8)).astype(np.float32)
    config = train_tokenizer.TrainTokenizerConfig(
        data=tmp_path,
        out=tmp_path / "out",
        epochs=0,
        validation_fraction=0.0,
        model=VQFusionOptions(latent_dim=8, quantizer=QuantizerConfig(stages="ternary*6")),
    )
    for out, length in (("even", 1.0), ("uneven", 1e3)):
        x_ND[123] *= length / np.linalg.norm(x_ND[123])
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), 8)
        pq.write_table(pa.table({"item_id": np.arange(500) + 9000, "text_emb": vectors}), tmp_path / "items.parquet")
        train_tokenizer.main(train_tokenizer.TrainTokenizerConfig(**{**vars(config), "out": tmp_path / out}))
        said = capsys.readouterr().err
        assert ("column 'text_emb': item 9123's vector has length 1e+03" in said) is (out == "uneven")
