"""NE, AUC and calibration against their formulas, warm and cold apart, on one process and two."""

import numpy as np
import pytest
import torch

from sidrec_torchrec.ranker.metrics import RankingMetrics
from sidrec_torchrec.ranker.model import RankerOutput


def make_predictions(n=400):
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.98, n)
    label = (rng.uniform(size=n) < p**1.3).astype(np.float64)
    return p, label, rng.uniform(size=n) < 0.7, (rng.uniform(size=n) < 0.9).astype(np.float64)


def output_of(p, label, seen, weight):
    """A ranker's output, and which targets are on items that training has."""
    tensors = [torch.from_numpy(np.asarray(a)).float().view(len(seen), -1) for a in (p, label, weight)]
    return RankerOutput(*tensors, torch.zeros(()), torch.zeros(())), torch.from_numpy(np.asarray(seen))


def by_formula(p, label, weight):
    p, label = p[weight > 0], label[weight > 0]
    rate = label.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    ne = -(label * np.log(p) + (1 - label) * np.log(1 - p)).mean() / entropy
    pairs = p[label == 1][:, None] - p[label == 0][None]
    return ne, (pairs > 0).mean() + (pairs == 0).mean() / 2, p.sum() / label.sum()


def check(values):
    p, label, seen, weight = make_predictions()
    for part, inside in (("all", seen | True), ("warm", seen), ("cold", ~seen)):
        expected = by_formula(p, label, weight * inside)
        got = [values[f"{kind}_{part}"] for kind in ("ne", "auc", "calibration")]
        assert got == pytest.approx(expected, rel=1e-5)
        assert values[f"targets_{part}"] == (weight * inside).sum()


def compute_share(rank, world_size):
    metrics = RankingMetrics(rank, world_size, torch.device("cpu"))
    for batch in np.split(np.arange(400), 4):
        share = batch[rank::world_size]
        metrics.update(*output_of(*(a[share] for a in make_predictions())))
    return metrics.compute()


def compute_on_this_rank():
    return compute_share(torch.distributed.get_rank(), torch.distributed.get_world_size())


def test_equals_the_formulas():
    check(compute_share(0, 1))


def test_two_processes_agree(run_distributed):
    first, second = run_distributed(compute_on_this_rank, 2)
    assert first == second
    check(first)


def test_undefined_values_are_none():
    metrics = RankingMetrics(0, 1, torch.device("cpu"))
    p, label, seen, weight = make_predictions()
    metrics.update(*output_of(p, label, seen | True, weight))
    values = metrics.compute()
    assert values["ne_cold"] is None and values["auc_cold"] is None and values["targets_cold"] == 0
    assert values["ne_warm"] == values["ne_all"]


@pytest.mark.parametrize("only", [0, 1])
def test_a_slice_of_one_class_has_no_ne(only):
    metrics = RankingMetrics(0, 1, torch.device("cpu"))
    p, label, seen, weight = make_predictions()
    label[~seen] = only
    metrics.update(*output_of(p, label, seen, weight))
    values = metrics.compute()
    assert [values[f"{kind}_cold"] for kind in ("ne", "auc", "calibration")] == [None] * 3
    assert values["targets_cold"] == (weight * ~seen).sum()
    assert values["ne_warm"] == pytest.approx(by_formula(p, label, weight * seen)[0], rel=1e-5)
