"""The search in float32, in C++ and in plain PyTorch: both only filter, so that digits are those of float64."""

import os
import shutil

import numpy as np
import pytest
import torch

from sidrec_torchrec.codec import search
from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.plan import Float32Plan, Plan, float32_is_ieee
from sidrec_torchrec.codec.search import encode
from sidrec_torchrec.native import build
from tests.codec.reference import vectors

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler")


@pytest.fixture(params=[pytest.param("C++", marks=needs_compiler), "reference"])
def implementation(request, monkeypatch):
    monkeypatch.setenv("SIDREC_OPS", request.param)
    assert build.is_available() == (request.param == "C++")


GRIDS = "onehot:9,ternary*6,levels:6^2,signs*2,onehot:7,ternary^3"


def exact_digits(basis_RD, stages, x_ND, offset_D):
    """The same greedy search, but in float64 throughout, of the residual itself, one vector and value at a time."""
    basis, residual_ND = basis_RD.double().numpy(), x_ND.double().numpy() - offset_D.double().numpy()
    digits, first = [], 0
    for stage in stages:
        rows = basis[first : first + stage.width]
        first += stage.width
        if stage.width == stage.radix:  # one-hot
            chosen = ((residual_ND[:, None] - rows) ** 2).sum(2).argmin(1)
            residual_ND = residual_ND - rows[chosen]
            digits.append(chosen)
            continue
        levels, digit = np.unique(stage.values().double().numpy()), np.zeros(len(residual_ND), dtype=np.int64)
        for row in rows:
            wanted = residual_ND @ row / (row @ row)
            chosen = np.abs(wanted[:, None] - levels).argmin(1)
            residual_ND = residual_ND - levels[chosen][:, None] * row
            digit = digit * len(levels) + chosen
        digits.append(digit)
    return np.stack(digits, axis=1)


@pytest.mark.parametrize("far", [0.0, 1e3, 1e12, 1e25])
def test_the_float32_filter_changes_no_digit(far, implementation):
    """Also where it can decide nothing: next to a large offset, or beyond float32."""
    stages = parse_stages(GRIDS)
    rng = np.random.default_rng(5)
    basis_RD = torch.from_numpy(rng.standard_normal((sum(stage.width for stage in stages), 24)))
    offset_D = torch.from_numpy(rng.standard_normal(24)) + far
    x_ND = torch.from_numpy(rng.standard_normal((20_000, 24)) * 4) + offset_D
    digits = encode(x_ND, basis_RD, stages, offset_D=offset_D).numpy()
    expected = exact_digits(basis_RD, stages, x_ND, offset_D)
    assert digits.tolist() == expected.tolist() if far < 1e12 else (digits == expected).mean() > 0.999


def test_most_vectors_need_no_float64(monkeypatch, implementation):
    stages = parse_stages("ternary*12")
    basis_RD, x_ND = torch.from_numpy(np.random.default_rng(6).standard_normal((12, 24))), vectors(5000, 24) - 3
    again = []
    exactly = search._encode_exactly
    monkeypatch.setattr(search, "_encode_exactly", lambda p, x, *rest: (again.append(len(x)), exactly(p, x, *rest)))
    encode(x_ND, basis_RD, stages)
    assert 0 < sum(again) < 250


@pytest.mark.parametrize("setting", ["mkldnn", "generic"])
def test_a_reduced_float32_precision_is_not_relied_on(setting, monkeypatch):
    assert float32_is_ieee()
    backend = torch.backends.mkldnn.matmul if setting == "mkldnn" else torch.backends
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        assert not float32_is_ieee()
    finally:
        backend.fp32_precision = before


STAGES = [
    "ternary",
    "ternary*25",
    "signs*17",
    "levels:9*5",
    "ternary^5,signs^3",
    "onehot:2",
    "onehot:33*3",
    "onehot:16,ternary*20",
    "ternary*3,onehot:5,levels:4^2,onehot:7,signs",
]


def of_all_kinds(n: int, dim: int) -> torch.Tensor:
    """Vectors of which a block each is normal, of small integers, of denormal numbers, of zeros, next to the largest."""
    rng = np.random.default_rng(8)
    x = rng.standard_normal((n, dim))
    kind = np.arange(n)[:, None] * 5 // n
    ordinary = np.where(kind == 1, rng.integers(-3, 4, (n, dim)) / 2, x)
    scale = np.select([kind == 2, kind == 3, kind == 4], [1e-40, 0.0, 3e37], 1.0)
    return torch.from_numpy(ordinary * scale).float()


@needs_compiler
@pytest.mark.parametrize("dim", [1, 5, 40, 131])
@pytest.mark.parametrize("stages", STAGES)
def test_what_cpp_is_sure_of_is_what_float64_says(stages, dim):
    """Against the plain search in float64, on the operator's own answer: nothing is decided again."""
    stages = parse_stages(stages)
    rng = np.random.default_rng(dim)
    basis_RD = torch.from_numpy(rng.standard_normal((sum(stage.width for stage in stages), dim)))
    plan = Plan(basis_RD, stages, 0.1)
    fast = Float32Plan(plan)
    for count in (1, 47, 48, 49, 2500):
        x_ND = of_all_kinds(count, dim)
        digits_NL, sure_N = fast.search(x_ND)
        expected_NL = torch.empty_like(digits_NL)
        search._encode_exactly(plan, x_ND, 1, expected_NL, range(count))
        assert torch.equal(digits_NL[sure_N], expected_NL[sure_N])
    assert sure_N[:500].float().mean() > 0.6
    assert not sure_N[2000:].any()  # too large for float32
    # the reference has the same bounds
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIDREC_OPS", "reference")
        _, reference_N = fast.search(x_ND)
    assert (sure_N ^ reference_N).float().mean() < 0.01
    # vectors that may be off by as much are sure less often, and never where they are not sure by themselves
    _, less_N = fast.search(x_ND, torch.full((count,), 1e6))
    assert not (less_N & ~sure_N).any() and less_N.sum() < sure_N.sum()


def test_float32_is_sure_where_no_threshold_is_near_and_only_there(implementation):
    """On orthonormal rows weights are what they were made as, but for rounding; half-way ones stand at a threshold."""
    rng = np.random.default_rng(9)
    weights_NR = np.zeros((2000, 40))
    weights_NR[:, :20] = rng.integers(-2, 3, (2000, 20))
    weights_NR[np.arange(2000), 20 + rng.integers(0, 20, 2000)] = 1
    between_levels, between_codewords = np.arange(0, 2000, 4), np.arange(1, 2000, 4)
    sure_N = np.arange(2000) % 4 > 1
    weights_NR[between_levels, rng.integers(0, 20, 500)] = rng.choice([-0.5, 0.5], 500)
    weights_NR[between_codewords, 20:] = 0
    for row in between_codewords:
        weights_NR[row, 20 + rng.choice(20, 2, replace=False)] = 0.5
    basis_RD = torch.from_numpy(np.linalg.qr(rng.standard_normal((40, 40)))[0])
    x_ND = (torch.from_numpy(weights_NR) @ basis_RD).float()
    plan = Plan(basis_RD, parse_stages("ternary*20,onehot:20"), 0.0)
    digits_NL, found_N = Float32Plan(plan).search(x_ND)
    assert found_N.tolist() == sure_N.tolist()
    exact_NL = torch.empty(2000, 21, dtype=torch.int16)
    search._encode_exactly(plan, x_ND, 1, exact_NL, range(2000))
    assert torch.equal(digits_NL[sure_N].long(), exact_NL[sure_N].long())
    assert not torch.equal(digits_NL[~sure_N].long(), exact_NL[~sure_N].long())  # rounding does change digits


@pytest.mark.parametrize("stages", STAGES)
def test_digits_are_the_same_with_and_without_cpp(stages, monkeypatch):
    stages = parse_stages(stages)
    basis_RD = vectors(sum(stage.width for stage in stages), 40, seed=3)
    x_ND = of_all_kinds(3000, 40)
    digits_NL = encode(x_ND, basis_RD, stages)
    monkeypatch.setenv("SIDREC_OPS", "reference")
    assert torch.equal(encode(x_ND, basis_RD, stages), digits_NL)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64", "every second row", "column by column"])
def test_vectors_of_any_type_and_layout(kind, implementation):
    x_ND, basis_RD, stages = vectors(4000, 24), vectors(18, 24, seed=3), parse_stages("onehot:6,ternary*12")
    x_ND = {
        "every second row": lambda: x_ND[::2],
        "column by column": lambda: x_ND.T.contiguous().T,
    }.get(kind, lambda: x_ND.to(getattr(torch, kind)))()
    expected = exact_digits(basis_RD, stages, x_ND, torch.zeros(24))
    assert encode(x_ND, basis_RD, stages).tolist() == expected.tolist()


def test_digits_do_not_depend_on_threads():
    x_ND, basis_RD, stages = vectors(5000, 24), vectors(25, 24, seed=3), parse_stages("ternary*25")
    digits_NL = encode(x_ND, basis_RD, stages)
    torch.set_num_threads(3)
    try:
        assert torch.equal(encode(x_ND, basis_RD, stages), digits_NL)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("beam", [1, 2])
def test_the_first_row_that_is_not_finite_is_named(value, beam, implementation, monkeypatch):
    monkeypatch.setattr(search, "_BLOCK_NUMBERS", 12_000)  # several blocks
    dpca = DPCA(DPCAConfig(dim=8, stages=parse_stages("onehot:4,ternary*8"), beam=beam))
    x_ND = vectors(4000, 8)
    x_ND[17] = 3e38  # finite, though its sum is not
    assert dpca.encode(x_ND).shape == (4000, 9)
    x_ND[3210, 7] = x_ND[3211, 0] = value
    with pytest.raises(ValueError, match="row 3210 holds a value that is not finite"):
        dpca.encode(x_ND)
    with pytest.raises(ValueError, match="row 3210 "):
        dpca.codes(x_ND)
