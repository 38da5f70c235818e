"""What a calibration curve is drawn of, against numpy: bins, counts, means."""

import json

import numpy as np
import pytest
import torch

from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.reliability import EDGES, Reliability

EMPTY = torch.zeros(())


def test_bins_are_their_definition():
    rng = np.random.default_rng(0)
    p_SK = rng.random((5_000, 2)) ** 3
    p_SK[:3, 0] = 0.0, 0.5, 1.0  # an edge belongs to the bin above it
    label_SK, weight_SK = rng.random((5_000, 2)) < p_SK, rng.random((5_000, 2)) < 0.7
    reliability = Reliability(torch.device("cpu"), ("click", "buy"))
    for part in np.split(np.arange(5_000), [17, 3_000]):
        output = (torch.tensor(x_SK[part], dtype=torch.float32) for x_SK in (p_SK, label_SK, weight_SK))
        reliability.update(RankerOutput(*output, EMPTY, EMPTY))
    found = reliability.compute()
    assert list(found) == ["click", "buy"]
    for k, rows in enumerate(found.values()):
        assert [row["from"] for row in rows] == [0.0, *EDGES] and [row["to"] for row in rows] == [*EDGES, 1.0]
        assert sum(row["targets"] for row in rows) == weight_SK[:, k].sum()
        p_S = p_SK[:, k].astype(np.float32).astype(float)
        for row in rows:
            last = row["to"] == 1.0
            inside_S = (p_S >= row["from"]) & ((p_S < row["to"]) | last) & weight_SK[:, k]
            assert (row["targets"], row["positives"]) == (inside_S.sum(), label_SK[inside_S, k].sum())
            assert row["prediction"] == (pytest.approx(p_S[inside_S].mean()) if inside_S.any() else None)
    json.dumps(found, allow_nan=False)


def test_a_regression_has_none():
    reliability = Reliability(torch.device("cpu"), ())
    reliability.update(RankerOutput(torch.ones(4, 1), torch.ones(4, 1), torch.ones(4, 1), EMPTY, EMPTY))
    assert reliability.compute() == {}
