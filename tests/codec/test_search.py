"""Beam search against faiss, and against trying every digit combination."""

import itertools

import faiss
import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.search import encode
from tests.codec.reference import vectors


def squared_errors(dpca, x_ND, digits_NL):
    return (x_ND.double() - dpca.decode(digits_NL).double()).square().sum(1).detach()


@pytest.fixture(scope="module")
def mixed():
    dpca = DPCA(DPCAConfig(dim=6, stages=parse_stages("onehot:5,ternary*3,onehot:3,ternary")))
    dpca.fit(vectors(300, 6))
    return dpca


def test_a_beam_as_wide_as_all_combinations_finds_the_best_of_them(mixed):
    x_ND = vectors(60, 6, seed=1)
    combinations = torch.tensor(list(itertools.product(*(range(stage.radix) for stage in mixed.stages))))
    all_errors = torch.stack([squared_errors(mixed, x_ND, row.expand(60, -1)) for row in combinations])
    found = squared_errors(mixed, x_ND, mixed.encode(x_ND, beam=len(combinations)))
    # decoded in float32: equal to its rounding
    torch.testing.assert_close(found, all_errors.min(0).values, rtol=1e-4, atol=1e-5)
    greedy = squared_errors(mixed, x_ND, mixed.encode(x_ND))
    assert (greedy > found + 1e-3).any()  # else this would not tell a beam from none


def test_a_wider_beam_lowers_the_error(mixed):
    x_ND = vectors(500, 6, seed=1)
    errors = [squared_errors(mixed, x_ND, mixed.encode(x_ND, beam=beam)).sum() for beam in (1, 4, 64)]
    assert errors[0] > errors[1] > errors[2]


def test_codes_of_faiss_residual_quantizer_with_a_beam():
    x_ND = vectors(800, 12)
    rq = faiss.ResidualQuantizer(12, 3, 5)
    rq.max_beam_size = 5
    rq.train(x_ND.numpy())
    basis_RD = torch.from_numpy(faiss.vector_to_array(rq.codebooks).reshape(96, 12))
    codes = faiss.unpack_bitstrings(rq.compute_codes(x_ND.numpy()), 3, 5)
    digits = encode(x_ND, basis_RD, parse_stages("onehot:32*3"), beam=5).numpy()
    # faiss computes in float32: candidates that tie to its rounding may fall out of one beam and not of the other
    assert (codes == digits).all(1).mean() > 0.99


@pytest.mark.parametrize("beam", [1, 3])
def test_digits_do_not_depend_on_blocks(mixed, beam, monkeypatch):
    x_ND = vectors(200, 6, seed=1)
    whole_NL = mixed.encode(x_ND, beam=beam)
    monkeypatch.setattr("sidrec_torchrec.codec.search._BLOCK_NUMBERS", 200)
    assert torch.equal(mixed.encode(x_ND, beam=beam), whole_NL)


def test_the_config_names_the_beam_used_everywhere(mixed):
    wide = DPCA(DPCAConfig(dim=6, stages=mixed.stages, beam=8))
    wide.load_state_dict(mixed.state_dict())
    x_ND = vectors(200, 6, seed=1)
    expected_NL = mixed.encode(x_ND, beam=8)
    assert not torch.equal(expected_NL, mixed.encode(x_ND))
    assert torch.equal(wide.encode(x_ND), expected_NL)
    assert torch.equal(wide(x_ND).digits_NL, expected_NL)


def test_beam_below_one_is_refused(mixed):
    with pytest.raises(ValueError, match="beam must be at least 1, got 0"):
        mixed.encode(vectors(3, 6), beam=0)


def test_beam_of_no_rows(mixed):
    assert mixed.encode(torch.zeros(0, 6), beam=3).shape == (0, 6)


def test_ternary_digits_round_the_projection_on_orthogonal_rows():
    """On orthogonal rows u_l, greedy coding is round(<x, u_l> / |u_l|^2), clipped to -1, 0, 1: a formula by hand."""
    scale = np.array([4.0, 2.0, 1.0])
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    basis = scale[:, None] * rotation
    x = np.random.default_rng(1).standard_normal((200, 3)) * 4
    expected = np.clip(np.rint(x @ basis.T / scale**2), -1, 1) + 1
    digits = encode(torch.from_numpy(x), torch.from_numpy(basis), parse_stages("ternary*3")).numpy()
    np.testing.assert_array_equal(digits, expected)
