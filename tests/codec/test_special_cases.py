"""What DPCA is with other alphabets: each special case coincides with the method it is said to be."""

import itertools

import faiss
import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from tests.codec.reference import faiss_codes_agree, vectors


def with_basis(stages, basis_RD, offset_D=None, **options):
    basis_RD = torch.as_tensor(basis_RD)
    dpca = DPCA(DPCAConfig(dim=basis_RD.shape[1], stages=parse_stages(stages), **options))
    with torch.no_grad():
        dpca.basis_RD.copy_(basis_RD)
        if offset_D is not None:
            dpca.mean_D.copy_(torch.as_tensor(offset_D))
    return dpca


def orthogonal(rows, dim, seed=0):
    """Orthogonal rows of different lengths."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.standard_normal((dim, dim)))[0][:rows]
    return torch.from_numpy(rotation * np.linspace(3, 1, rows)[:, None]).float()


@pytest.mark.parametrize("beam", [1, 5])
def test_one_hot_stages_are_faiss_residual_quantization(beam):
    x_ND = vectors(800, 12)
    rq = faiss.ResidualQuantizer(12, 3, 5)
    rq.max_beam_size = beam
    rq.train(x_ND.numpy())
    basis = faiss.vector_to_array(rq.codebooks).reshape(96, 12)
    theirs = faiss.unpack_bitstrings(rq.compute_codes(x_ND.numpy()), 3, 5).astype(np.int64)
    dpca = with_basis("onehot:32*3", basis, beam=beam)
    ours = dpca.encode(x_ND).numpy()
    # faiss computes in float32: where digits differ, a tie to its rounding let candidates in or out
    assert (ours == theirs).all(1).mean() > 0.99
    if beam == 1:
        faiss_codes_agree(theirs, ours, basis.reshape(3, 32, 12), x_ND.numpy())
    chosen = [basis.reshape(3, 32, 12)[np.arange(3), codes].sum(1) for codes in (ours, theirs)]
    mine, other = (((x_ND.numpy().astype(np.float64) - part) ** 2).sum() for part in chosen)
    assert mine == pytest.approx(other, rel=1e-3)


def test_real_stages_are_principal_component_analysis():
    x_ND = vectors(500, 12)
    dpca = DPCA(DPCAConfig(dim=12, stages=parse_stages("real^3,real*2"), iterations=0))
    (error,) = dpca.fit(x_ND)
    centered = x_ND.double().numpy() - x_ND.double().numpy().mean(0)
    left, size, axes = np.linalg.svd(centered, full_matrices=False)
    assert error == pytest.approx((size[5:] ** 2).sum() / (size**2).sum(), rel=1e-6)
    codes_NR, basis_RD = dpca.codes(x_ND), dpca.basis_RD.detach()
    np.testing.assert_allclose(np.abs(codes_NR.numpy()), np.abs(left[:, :5] * size[:5]), rtol=1e-3, atol=1e-3)
    expected = centered.mean(0) + (left[:, :5] * size[:5]) @ axes[:5]
    np.testing.assert_allclose((codes_NR @ basis_RD).numpy(), expected, atol=1e-3)


def test_rounds_do_not_lead_away_from_the_principal_components():
    x_ND = vectors(500, 12)
    errors = DPCA(DPCAConfig(dim=12, stages=parse_stages("real^5"), iterations=4)).fit(x_ND)
    assert errors[-1] == pytest.approx(errors[0], rel=1e-2)


def test_real_stages_have_codes_and_no_digits():
    dpca = with_basis("ternary,real^2", orthogonal(3, 6))
    with pytest.raises(ValueError, match=r"a 'real\^2' stage has no digits"):
        dpca.encode(vectors(3, 6))
    with pytest.raises(ValueError, match="a beam"):
        dpca.codes(vectors(3, 6), beam=2)
    assert dpca.codes(vectors(3, 6)).shape == (3, 3)
    assert dpca.codes(vectors(0, 6)).shape == (0, 3)


def fsq(z, levels, eps=1e-3):
    """Mentzer et al. 2023, arXiv 2309.15505, appendix A.1: bound, then round; bounded values, and codes 0 .. L - 1."""
    levels = np.asarray(levels, dtype=np.float64)
    half_l = (levels - 1) * (1 - eps) / 2
    offset = np.where(levels % 2 == 1, 0.0, 0.5)
    bounded = np.tanh(z + np.tan(offset / half_l)) * half_l - offset
    return bounded, (np.rint(bounded) + levels // 2).astype(np.int64)


@pytest.mark.parametrize("levels", [(8, 8, 8, 8), (5, 5, 5, 5), (8, 5, 5, 5), (7, 4, 3, 2)])
def test_levels_on_the_identity_are_the_rounding_of_fsq(levels):
    z = np.random.default_rng(0).standard_normal((1000, 4)) * 1.5
    bounded, expected = fsq(z, levels)
    # levels are centred: FSQ's, of an even number, lie half a level lower
    offset = [0.0 if count % 2 else -0.5 for count in levels]
    dpca = with_basis(",".join(f"levels:{count}" for count in levels), torch.eye(4), offset)
    bounded_ND = torch.from_numpy(bounded)
    np.testing.assert_array_equal(dpca.encode(bounded_ND).numpy(), expected)
    np.testing.assert_allclose(dpca.decode(dpca.encode(bounded_ND)).detach().numpy(), np.rint(bounded), atol=1e-6)
    if len(set(levels)) == 1:  # one stage: its digit is the codes in mixed radix
        one = with_basis(f"levels:{levels[0]}^4", torch.eye(4), offset)
        joined = expected @ levels[0] ** np.arange(3, -1, -1)
        np.testing.assert_array_equal(one.encode(bounded_ND)[:, 0].numpy(), joined)


def test_levels_on_the_identity_are_the_fsq_of_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    peer = library.FSQ(levels=[8, 5, 5, 6])
    z_ND = torch.from_numpy(np.random.default_rng(1).standard_normal((1, 500, 4))).float()
    quantized_ND, _ = peer(z_ND)
    half_ND = torch.tensor([4.0, 2, 2, 3])  # it scales its levels to [-1, 1]
    dpca = with_basis("levels:8,levels:5*2,levels:6", torch.eye(4), [-0.5, 0, 0, -0.5])
    bounded_ND = torch.from_numpy(fsq(z_ND[0].double().numpy(), [8, 5, 5, 6], eps=-1e-3)[0])  # its sign of eps
    torch.testing.assert_close(dpca.decode(dpca.encode(bounded_ND)).detach(), quantized_ND[0] * half_ND)


def test_signs_on_the_identity_are_lookup_free_quantization():
    x_ND = torch.from_numpy(np.random.default_rng(2).standard_normal((300, 6))).float()
    dpca = with_basis("signs^6", torch.eye(6))
    digits_N1 = dpca.encode(x_ND)
    torch.testing.assert_close(dpca.decode(digits_N1).detach(), torch.where(x_ND > 0, 1.0, -1.0))
    # Yu et al. 2023, arXiv 2310.05737, eq. 3: the index is the bits, here the first most significant
    np.testing.assert_array_equal(digits_N1[:, 0].numpy(), (x_ND.numpy() > 0) @ 2 ** np.arange(5, -1, -1))


def test_lookup_free_quantization_of_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")
    peer = library.LFQ(dim=6, codebook_size=64).eval()
    x_ND = torch.from_numpy(np.random.default_rng(3).standard_normal((200, 6))).float()
    indices_N = peer(x_ND.unsqueeze(0))[1][0]
    assert torch.equal(with_basis("signs^6", torch.eye(6)).encode(x_ND)[:, 0].long(), indices_N)


def test_ternary_power_is_the_best_of_all_its_words_on_orthogonal_rows():
    basis_RD, x_ND = orthogonal(4, 7), vectors(300, 7) - 3
    words = np.array(list(itertools.product((-1, 0, 1), repeat=4)), dtype=np.float64) @ basis_RD.double().numpy()
    distance = ((x_ND.double().numpy()[:, None] - words) ** 2).sum(2)
    digits = with_basis("ternary^4", basis_RD).encode(x_ND)[:, 0].numpy()
    np.testing.assert_array_equal(digits, distance.argmin(1))
    assert len(set(digits.tolist())) > 20


@pytest.mark.parametrize("beam", [1, 6])
@pytest.mark.parametrize("scalar", ["ternary", "signs", "levels:4"])
def test_a_power_is_as_many_digits_in_one(scalar, beam):
    basis_RD, x_ND = torch.from_numpy(np.random.default_rng(4).standard_normal((6, 8))).float(), vectors(200, 8) - 3
    one = with_basis(f"{scalar}^4,{scalar}^2", basis_RD, beam=beam)
    many = with_basis(f"{scalar}*6", basis_RD, beam=beam)
    radix = parse_stages(scalar)[0].radix
    digits = many.encode(x_ND).numpy().astype(np.int64)
    expected = np.stack([digits[:, :4] @ radix ** np.arange(3, -1, -1), digits[:, 4:] @ [radix, 1]], axis=1)
    np.testing.assert_array_equal(one.encode(x_ND).numpy(), expected)
    torch.testing.assert_close(one.decode(one.encode(x_ND)), many.decode(many.encode(x_ND)))
    torch.testing.assert_close(one.codes(x_ND), many.codes(x_ND))


def test_codes_are_what_digits_weigh_the_basis_with():
    dpca = DPCA(DPCAConfig(dim=8, stages=parse_stages("onehot:4,ternary^3,levels:5,signs"), iterations=2))
    dpca.fit(vectors(300, 8))
    x_ND = vectors(100, 8, seed=1)
    decoded_ND = dpca.offset + dpca.codes(x_ND) @ dpca.basis_RD
    torch.testing.assert_close(decoded_ND, dpca.decode(dpca.encode(x_ND)))


@pytest.mark.parametrize("stages", ["ternary^3*3", "levels:4*4", "signs^4*2", "onehot:8,levels:5^2*2"])
def test_every_alphabet_fits(stages):
    dpca = DPCA(DPCAConfig(dim=8, stages=parse_stages(stages), iterations=6))
    errors = dpca.fit(vectors(500, 8))
    assert errors[-1] <= errors[0] < 0.7
