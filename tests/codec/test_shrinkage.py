"""The ridge that weighs itself: against its fixed point's equations, and against the best ridge a known truth has."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.shrinkage import bands, shrunk_rows

COUNT, WIDTHS, DIM = 400, [12, 12, 1], 40


@pytest.mark.parametrize("dim, expected", [(1, [1]), (8, [8]), (9, [8, 1]), (40, [8, 8, 16, 8])])
def test_bands_cover_all_axes(dim, expected):
    assert bands(dim) == expected


@pytest.fixture
def problem():
    """Codes, the true rows (strong along the first axes, next to nothing along the last) and noisy vectors."""
    rng = np.random.default_rng(0)
    codes = np.concatenate([np.eye(12)[rng.integers(0, 12, COUNT)] for _ in range(2)], 1)
    codes = np.concatenate([codes, rng.integers(-1, 2, (COUNT, 1))], 1)
    truth = rng.standard_normal((25, DIM)) * np.repeat([2.0, 0.5, 0.1, 0.02], bands(DIM))
    return codes, truth, codes @ truth + rng.standard_normal((COUNT, DIM))


def solve(codes, x, rounds=60):
    gram, cross = torch.from_numpy(codes.T @ codes), torch.from_numpy(codes.T @ x)
    weight = torch.ones(3, len(bands(DIM)), dtype=torch.float64)
    for _ in range(rounds):
        previous = weight
        rows, weight = shrunk_rows(gram, cross, torch.from_numpy((x**2).sum(0)), weight, WIDTHS, COUNT)
    return rows, weight, previous


def test_rows_are_the_ridge_solution_and_weights_satisfy_mackays_equations(problem):
    codes, _, x = problem
    rows_RD, next_SB, weight_SB = solve(codes, x)
    np.testing.assert_allclose(next_SB, weight_SB, rtol=1e-3)  # a fixed point
    ends = np.cumsum([0, *bands(DIM)])
    starts = np.cumsum([0, *WIDTHS])
    for b, (first, last) in enumerate(pairwise(ends)):
        ridge = np.repeat(weight_SB[:, b].numpy(), WIDTHS)
        inverse = np.linalg.inv(codes.T @ codes + np.diag(ridge))
        rows = inverse @ codes.T @ x[:, first:last]
        np.testing.assert_allclose(rows_RD[:, first:last], rows, rtol=1e-8, atol=1e-10)
        free = 1 - ridge * inverse.diagonal()  # MacKay 1992, equations 4.8 to 4.10
        noise = ((x[:, first:last] - codes @ rows) ** 2).sum() / (COUNT - free.sum())
        for s, (start, end) in enumerate(pairwise(starts)):
            prior = (rows[start:end] ** 2).sum() / free[start:end].sum()
            assert next_SB[s, b] == pytest.approx(min(noise / prior, COUNT), rel=1e-6)


def test_it_is_nearer_the_truth_than_least_squares_and_than_any_single_ridge(problem):
    codes, truth, x = problem

    def miss(rows):
        return ((codes @ (rows - truth)) ** 2).sum()

    ours = miss(solve(codes, x)[0].numpy())
    single = [miss(np.linalg.solve(codes.T @ codes + r * np.eye(25), codes.T @ x)) for r in np.logspace(-6, 4, 60)]
    assert ours < 0.6 * miss(np.linalg.lstsq(codes, x, rcond=None)[0])
    assert ours < 0.9 * min(single)


def test_a_stage_of_no_use_is_shrunk_but_not_for_good(problem):
    codes, _, x = problem
    silent = np.concatenate([x[:, :8], np.zeros((COUNT, DIM - 8))], 1)
    rows_RD, weight_SB, _ = solve(codes, silent)
    assert np.isfinite(rows_RD.numpy()).all()
    assert weight_SB.max() <= COUNT
