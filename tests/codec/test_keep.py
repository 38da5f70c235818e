"""The pull at changed digits: 0 exactly where encoding keeps them, distances and gradients by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.keep import moved

DIM = 6


def make(stages: str, seed: int = 0) -> DPCA:
    torch.manual_seed(seed)
    dpca = DPCA(DPCAConfig(dim=DIM, stages=parse_stages(stages))).double()
    dpca.mean_D.copy_(torch.randn(DIM))
    return dpca.requires_grad_(False)


def tables(dpca: DPCA) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return dpca.offset, dpca.digit_tables()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(
        ["ternary*5", "signs*4", "levels:5*3", "onehot:7*3", "onehot:4,ternary*3", "onehot:3,signs*2,ternary"]
    ),
    st.integers(0, 10_000),
)
def test_zero_exactly_where_encoding_keeps_all_digits(stages, seed):
    dpca = make(stages, seed)
    z_ND = 2 * torch.randn(200, DIM, dtype=torch.float64)
    digits_NL = dpca.encode(z_ND)
    published_NL = digits_NL.clone()
    radices = torch.tensor([stage.radix for stage in dpca.stages])
    other_NL = (torch.rand(200, len(radices)) * radices).short()
    is_other_NL = torch.rand(200, len(radices)) < 0.2
    published_NL[is_other_NL] = other_NL[is_other_NL]
    moved_N = moved(z_ND, *tables(dpca), published_NL, margin=0.0)
    assert torch.equal(moved_N > 0, (published_NL != digits_NL).any(1))


def by_hand(z_D: np.ndarray, offset_D: np.ndarray, rows: list[np.ndarray], digits: list[int], margin: float) -> float:
    left, total = z_D - offset_D, 0.0
    for table, digit in zip(rows, digits, strict=True):
        own = table[digit]
        ways = [other - own for k, other in enumerate(table) if k != digit]
        total += max(0.0, max(float((left - own) @ way / (way @ way)) for way in ways) - 0.5 + margin)
        left = left - own
    return total


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_as_by_hand(margin):
    dpca = make("onehot:4,ternary*2,levels:4")
    z_ND = torch.randn(50, DIM, dtype=torch.float64)
    published_NL = torch.stack([torch.randint(stage.radix, (50,)) for stage in dpca.stages], dim=1)
    offset_D, rows = tables(dpca)
    moved_N = moved(z_ND, offset_D, rows, published_NL, margin=margin)
    arrays = [table.numpy() for table in rows]
    expected = [
        by_hand(z_D.numpy(), offset_D.numpy(), arrays, digits.tolist(), margin)
        for z_D, digits in zip(z_ND, published_NL, strict=True)
    ]
    np.testing.assert_allclose(moved_N.numpy(), expected, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_trit_is_its_row_over_its_square():
    """Of level y = z u / |u|^2, a published trit t costs |y - t| - 1/2 + margin: along u / |u|^2, in from outside."""
    u_D = torch.tensor([3.0, 4.0])
    table = torch.stack([-u_D, 0 * u_D, u_D])
    # level, published trit, the derivative by the level; 2 is beyond all trits, and is kept as 1 without a pull
    for level, trit, slope in ((0.7, 0, 1), (-0.7, 0, -1), (0.3, 0, 0), (0.1, 1, -1), (2.0, 1, 0), (0.2, -1, 1)):
        z_1D = (level * u_D).unsqueeze(0).requires_grad_(True)
        loss_N = moved(z_1D, torch.zeros(2), [table], torch.tensor([[trit + 1]]), margin=0.1)
        expected = max(0.0, slope * (level - trit) - 0.4)
        assert float(loss_N.detach()) == pytest.approx(expected, abs=1e-6)
        loss_N.sum().backward()
        torch.testing.assert_close(z_1D.grad, (slope * u_D / 25).unsqueeze(0))


def test_twins_and_rows_of_zeros_pull_at_nothing():
    """No digit can be told from its twin, nor a serial digit's values from one another: they are nobody's to keep."""
    z_ND = torch.randn(20, 3).requires_grad_(True)
    twins = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    digits_NL = torch.zeros(20, 2, dtype=torch.int16)
    loss_N = moved(z_ND, torch.zeros(3), [twins, torch.zeros(4, 3)], digits_NL, margin=0.1)
    assert not loss_N.any()
    loss_N.sum().backward()
    assert not z_ND.grad.any()


def test_no_vectors():
    dpca = make("ternary*5")
    digits_NL = torch.zeros(0, 5, dtype=torch.int16)
    assert moved(torch.zeros(0, DIM, dtype=torch.float64), *tables(dpca), digits_NL, margin=0.1).shape == (0,)
