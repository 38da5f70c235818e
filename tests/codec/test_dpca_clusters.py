"""Vectors that fewer codes tell apart than there are digits: fitting never ends far worse than it began."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig

GRIDS = ("ternary*25", "signs*12", "ternary^2*8", "levels:5*8")
STAGES = (*GRIDS, "onehot:16,ternary*10")


def fit(x_ND: torch.Tensor, stages: str = "ternary*25", **changes) -> tuple[DPCA, list[float]]:
    dpca = DPCA(DPCAConfig(dim=x_ND.shape[1], stages=parse_stages(stages), **changes))
    return dpca, dpca.fit(x_ND)


def clusters(count: int, noise: float, dim: int = 48, rows: int = 600, seed: int = 0) -> torch.Tensor:
    """Vectors around ``count`` centres of size 1 a component, the first of each cluster at ``i * (rows // count)``."""
    generator = torch.Generator().manual_seed(seed)
    centres_KD = torch.randn(count, dim, generator=generator)
    x_ND = centres_KD.repeat_interleave(rows // count, 0)
    return x_ND + noise * torch.randn(x_ND.shape, generator=generator)


@settings(max_examples=12, deadline=None)
@given(
    count=st.integers(1, 40),
    noise=st.sampled_from([0.0, 1e-3, 0.02, 0.1]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    stages=st.sampled_from(STAGES),
    seed=st.integers(0, 1000),
)
def test_what_is_kept_is_at_most_a_little_worse_than_the_best(count, noise, scale, stages, seed):
    x_ND = scale * clusters(count, noise, seed=seed)
    dpca, errors = fit(x_ND, stages)
    assert errors[-1] <= 2 * min(errors) + 0.02 and max(errors) <= 2 * errors[0] + 0.02
    x_hat_ND = dpca.decode(dpca.encode(x_ND)).detach()
    energy = float((x_ND - x_ND.mean(0)).square().sum())
    assert float((x_ND - x_hat_ND).square().sum()) <= (errors[-1] + 1e-4) * energy + 1e-6 * float(x_ND.square().sum())


@settings(max_examples=6, deadline=None)
@given(count=st.integers(2, 20), noise=st.sampled_from([0.0, 1e-3, 0.02]), seed=st.integers(0, 1000))
def test_every_cluster_keeps_a_sid_of_its_own(count, noise, seed):
    x_ND = clusters(count, noise, seed=seed)
    dpca, _ = fit(x_ND)
    first_K = torch.arange(count) * (600 // count)
    assert len(torch.unique(dpca.encode(x_ND)[first_K], dim=0)) == count


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 24), stages=st.sampled_from(GRIDS), seed=st.integers(0, 1000))
def test_fewer_vectors_than_digits(rows, stages, seed):
    """Not of one-hot stages, whose codewords are shrunk by half where each is of one vector: nothing tells noise then."""
    x_ND = torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed))
    _, errors = fit(x_ND, stages)
    assert errors[-1] <= 2 * min(errors) + 0.02


def test_constants_and_repetitions():
    assert fit(torch.ones(50, 8))[1][-1] == 0
    constant_ND = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    constant_ND[:, 3] = 5.0
    assert fit(constant_ND)[1][-1] < 0.02
    integers_ND = torch.randint(0, 2, (300, 6), generator=torch.Generator().manual_seed(0)).float().repeat(1, 2)
    assert fit(integers_ND)[1][-1] < 0.05


def test_an_interrupted_fit_that_is_over_stays_over(tmp_path):
    x_ND = clusters(15, 0.02)
    whole, errors = fit(x_ND)
    dpca = DPCA(DPCAConfig(dim=48, stages=parse_stages("ternary*25")))
    assert dpca.fit(x_ND, checkpoint=tmp_path / "fit.pt") == errors
    again = DPCA(DPCAConfig(dim=48, stages=parse_stages("ternary*25")))
    assert again.fit(x_ND, checkpoint=tmp_path / "fit.pt") == errors
    assert len(errors) < 21
    assert torch.equal(again.basis_RD, whole.basis_RD)
