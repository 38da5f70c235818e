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


GRIDS = "onehot:9,ternary*6,levels:6^2,signs*2,onehot:7,ternary^3"


@pytest.mark.parametrize("stages", ["ternary*5", "levels:4*5", "signs^5", "onehot:4,ternary"])
def test_a_tie_goes_to_the_lower_digit_whatever_the_batch(stages):
    """Small integers tie all the time; a large irrational turn of all vectors makes their rounding errors differ."""
    stages = parse_stages(stages)
    rng = np.random.default_rng(7)
    turn = np.linalg.qr(rng.standard_normal((5, 5)))[0]
    x = rng.integers(-3, 4, (4000, 5)) / 2
    turned_ND, basis_RD = torch.from_numpy(x @ turn), torch.from_numpy(np.eye(5) @ turn)
    digits_NL = encode(turned_ND, basis_RD, stages)
    np.testing.assert_array_equal(digits_NL.numpy(), encode(torch.from_numpy(x), torch.eye(5), stages).numpy())
    for size in (1, 3, 100):
        assert torch.equal(
            torch.cat([encode(part, basis_RD, stages) for part in turned_ND[:300].split(size)]), digits_NL[:300]
        )


@pytest.mark.parametrize("beam", [2, 5, 30])
def test_a_beam_over_repeated_codewords_gives_the_lowest_digits(beam):
    """Every codeword three times: candidates tie in threes, and rounding must not choose among them."""
    x_ND = vectors(200, 6, seed=1)
    basis_RD = vectors(12, 6, seed=2).repeat_interleave(3, dim=0)
    stages = parse_stages("onehot:18*2")
    digits_NL = encode(x_ND, basis_RD, stages, beam=beam)
    assert not (digits_NL % 3).any()
    turn_DD = torch.from_numpy(np.linalg.qr(np.random.default_rng(3).standard_normal((6, 6)))[0])
    turned_NL = encode(x_ND.double() @ turn_DD, basis_RD.double() @ turn_DD, stages, beam=beam)
    assert torch.equal(turned_NL, digits_NL)
    assert torch.equal(torch.cat([encode(part, basis_RD, stages, beam=beam) for part in x_ND.split(7)]), digits_NL)


def test_rows_of_zeros_weigh_nothing():
    basis_RD = torch.zeros(6, 4)
    basis_RD[0] = 1
    digits_NL = encode(vectors(50, 4), basis_RD, parse_stages("ternary*2,signs,onehot:3"))
    assert digits_NL[:, 1:].unique(dim=0).tolist() == [[1, 0, 0]]


def encode_share(x_ND, basis_RD):
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return encode(x_ND.chunk(size)[rank], basis_RD, parse_stages(GRIDS))


def test_two_processes_encode_as_one(run_distributed):
    x_ND, basis_RD = vectors(3001, 12), vectors(sum(stage.width for stage in parse_stages(GRIDS)), 12, seed=9)
    shares = run_distributed(encode_share, 2, x_ND, basis_RD)
    assert torch.equal(torch.cat(list(shares)), encode(x_ND, basis_RD, parse_stages(GRIDS)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("beam", [1, 4])
def test_cuda_encodes_as_cpu(beam):
    x_ND, basis_RD = vectors(3001, 12), vectors(sum(stage.width for stage in parse_stages(GRIDS)), 12, seed=9)
    on_cpu_NL = encode(x_ND, basis_RD, parse_stages(GRIDS), beam=beam)
    assert torch.equal(encode(x_ND.cuda(), basis_RD.cuda(), parse_stages(GRIDS), beam=beam).cpu(), on_cpu_NL)


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
