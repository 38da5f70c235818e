"""DPCA against brute force, faiss and the definition of what it learns."""

from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from tests.codec.reference import faiss_codes_agree, greedy_digits, vectors

MIXED = "onehot:16,ternary*6,onehot:5,ternary*3"


def fitted(stages=MIXED, dim=12, n=600, **options):
    dpca = DPCA(DPCAConfig(dim=dim, stages=parse_stages(stages), **options))
    return dpca, dpca.fit(vectors(n, dim))


def relative_error(dpca, x_ND, num_digits=None):
    x_ND = x_ND.double()
    left = x_ND - dpca.decode(dpca.encode(x_ND), num_digits=num_digits).detach()
    return float(left.square().sum() / (x_ND - x_ND.mean(0)).square().sum())


@pytest.mark.parametrize("stages", ["ternary*10", "onehot:16*3", MIXED])
def test_encode_is_greedy_over_the_vectors_themselves(stages):
    dpca, _ = fitted(stages)
    x_ND = vectors(200, 12, seed=1)
    digits_NL = dpca.encode(x_ND)
    assert digits_NL.dtype == torch.int16
    np.testing.assert_array_equal(digits_NL.numpy(), greedy_digits(dpca, x_ND))


def test_one_hot_stages_alone_are_residual_quantization():
    x_ND = vectors(800, 12)
    rq = faiss.ResidualQuantizer(12, 3, 5)
    rq.max_beam_size = 1
    rq.train(x_ND.numpy())
    codebooks = faiss.vector_to_array(rq.codebooks).reshape(3, 32, 12)
    dpca = DPCA(DPCAConfig(dim=12, stages=parse_stages("onehot:32*3")))
    with torch.no_grad():
        dpca.basis_RD.copy_(torch.from_numpy(codebooks.reshape(96, 12)))
    codes = faiss.unpack_bitstrings(rq.compute_codes(x_ND.numpy()), 3, 5)
    digits = dpca.encode(x_ND).numpy()
    assert faiss_codes_agree(codes, digits, codebooks, x_ND.numpy()) > 0.99
    np.testing.assert_allclose(
        dpca.decode(torch.from_numpy(codes.astype(np.int64))).detach().numpy(),
        rq.decode(rq.compute_codes(x_ND.numpy())),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("rows", [400, 3])
def test_digits_do_not_depend_on_the_batch(rows):
    """With 3 rows the 16 codewords repeat, and every distance ties."""
    dpca, _ = fitted(n=rows)
    x_ND = vectors(150, 12, seed=1)
    together_NL = dpca.encode(x_ND)
    for size in (1, 2, 7, 64):
        assert torch.equal(torch.cat([dpca.encode(part) for part in x_ND.split(size)]), together_NL)
    order_N = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dpca.encode(x_ND[order_N]), together_NL[order_N])


def test_repeated_codewords_give_their_first():
    dpca = DPCA(DPCAConfig(dim=16, stages=parse_stages("onehot:250,ternary")))
    few_KD = vectors(4, 16)
    with torch.no_grad():
        dpca.basis_RD[:250] = few_KD[torch.arange(250) % 4]
    assert int(dpca.encode(vectors(100, 16, seed=1))[:, 0].max()) == 3


@pytest.mark.parametrize("stages", ["ternary*12", "onehot:16*3", MIXED])
def test_fit_is_better_than_its_start_and_reports_the_error_it_reaches(stages):
    dpca, errors = fitted(stages, beam=4)
    assert len(errors) == 1 + dpca.config.iterations
    assert errors[-1] < errors[0]
    assert relative_error(dpca, vectors(600, 12)) == pytest.approx(errors[-1], rel=1e-4)


@pytest.mark.parametrize("stages", ["ternary*12", "onehot:16,ternary*8"])
def test_every_further_digit_lowers_the_error(stages):
    dpca, _ = fitted(stages)
    by_depth = [relative_error(dpca, vectors(600, 12), k) for k in range(len(dpca.stages) + 1)]
    assert by_depth[0] == pytest.approx(1.0, abs=1e-5)  # no digits: the mean
    assert all(deeper < shallower for shallower, deeper in pairwise(by_depth))


def test_joint_least_squares_beats_stagewise_codebooks_of_faiss():
    x_ND = vectors(800, 12)
    rq = faiss.ResidualQuantizer(12, 3, 4)
    rq.max_beam_size = 4
    rq.train(x_ND.numpy())
    faiss_left = x_ND.numpy() - rq.decode(rq.compute_codes(x_ND.numpy()))
    faiss_error = (faiss_left**2).sum() / ((x_ND - x_ND.mean(0)) ** 2).sum().item()
    dpca = DPCA(DPCAConfig(dim=12, stages=parse_stages("onehot:16*3"), beam=4))
    assert dpca.fit(x_ND)[-1] < faiss_error


def test_one_ternary_digit_finds_three_points_on_a_line():
    direction_D = torch.tensor([3.0, 4.0])
    x_ND = torch.tensor([[-1.0], [0.0], [1.0]]).repeat(20, 1) * direction_D + 7
    dpca = DPCA(DPCAConfig(dim=2, stages=parse_stages("ternary")))
    assert dpca.fit(x_ND)[-1] < 1e-12
    torch.testing.assert_close(dpca.mean_D, torch.tensor([7.0, 7.0]))
    torch.testing.assert_close(dpca.basis_RD.detach().abs(), direction_D.unsqueeze(0))


def test_initialize_gives_the_same_quantizer_each_time():
    x_ND = vectors(300, 12)
    states = []
    for _ in range(2):
        dpca = DPCA(DPCAConfig(dim=12, stages=parse_stages(MIXED)))
        dpca.initialize(x_ND)
        states.append(dpca.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gradient_passes_straight_through_to_input_and_basis():
    dpca, _ = fitted("onehot:4,ternary*3", dim=3, n=100, commitment=0.5)
    dpca.train()
    z_ND = vectors(20, 3, seed=1).requires_grad_()
    weights_ND = vectors(20, 3, seed=2)
    quantized = dpca(z_ND)
    torch.testing.assert_close(quantized.z_q_ND, dpca.decode(quantized.digits_NL))

    (quantized.z_q_ND * weights_ND).sum().backward()
    torch.testing.assert_close(z_ND.grad, weights_ND)
    expected_RD = torch.zeros_like(dpca.basis_RD)
    for digits, weight_D in zip(quantized.digits_NL.tolist(), weights_ND, strict=True):
        expected_RD[digits[0]] += weight_D
        for j in range(3):
            expected_RD[4 + j] += (digits[1 + j] - 1) * weight_D
    torch.testing.assert_close(dpca.basis_RD.grad, expected_RD)


def test_loss_pulls_the_basis_fully_and_the_input_by_the_commitment():
    dpca, _ = fitted("onehot:4,ternary*3", dim=3, n=100, commitment=0.25)
    z_ND = vectors(20, 3, seed=1).requires_grad_()
    quantized = dpca(z_ND)
    left_ND = (z_ND - dpca.decode(quantized.digits_NL)).detach()
    assert quantized.loss.item() == pytest.approx(1.25 * left_ND.square().sum(1).mean().item(), rel=1e-5)
    quantized.loss.backward()
    torch.testing.assert_close(z_ND.grad, 0.25 * 2 * left_ND / 20)
    used_by_0 = quantized.digits_NL[:, 0] == 0
    torch.testing.assert_close(dpca.basis_RD.grad[0], -2 * left_ND[used_by_0].sum(0) / 20)


def test_gradient_steps_lower_the_error_of_a_bad_basis():
    torch.manual_seed(0)
    dpca = DPCA(DPCAConfig(dim=4, stages=parse_stages("onehot:8,ternary*4")))
    x_ND = vectors(200, 4)
    optimizer = torch.optim.Adam(dpca.parameters(), lr=0.1)
    before = relative_error(dpca, x_ND)
    for _ in range(100):
        optimizer.zero_grad()
        dpca(x_ND).loss.backward()
        optimizer.step()
    assert relative_error(dpca, x_ND) < 0.1 * before


@pytest.mark.parametrize(
    "x_ND",
    [
        pytest.param(vectors(1, 6), id="one row"),
        pytest.param(torch.full((50, 6), 0.1), id="constant"),
        pytest.param(torch.zeros(50, 6), id="zero"),
        pytest.param(torch.eye(6)[[0, 1] * 20], id="two distinct rows"),
    ],
)
def test_few_distinct_vectors_are_learned_exactly(x_ND):
    dpca = DPCA(DPCAConfig(dim=6, stages=parse_stages("onehot:16,ternary*4")))
    errors = dpca.fit(x_ND)
    assert np.isfinite(errors).all()
    torch.testing.assert_close(dpca.decode(dpca.encode(x_ND)).detach(), x_ND, rtol=1e-5, atol=1e-6)


def test_fewer_vectors_than_codewords_are_learned_but_not_believed():
    """With a codeword each, nothing tells noise from signal: rows are shrunk, and their mean is still the best start."""
    x_ND = vectors(5, 6)
    errors = DPCA(DPCAConfig(dim=6, stages=parse_stages("onehot:16,ternary*4"))).fit(x_ND)
    assert np.isfinite(errors).all() and errors[-1] < 0.5


def test_a_codeword_nothing_uses_stays_finite():
    x_ND = vectors(300, 6)
    x_ND[:, 1:] = 0  # one direction of variance for six rows of the basis
    dpca = DPCA(DPCAConfig(dim=6, stages=parse_stages("onehot:2,ternary*6")))
    errors = dpca.fit(x_ND)
    assert torch.isfinite(dpca.basis_RD).all() and errors[-1] < 0.01


def test_a_large_mean_does_not_blur_small_differences():
    x_ND = vectors(400, 6).double()
    near, far = (DPCA(DPCAConfig(dim=6, stages=parse_stages("ternary*10"))) for _ in range(2))
    assert far.fit(x_ND + 2.0**20)[-1] == pytest.approx(near.fit(x_ND)[-1], rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_encoded_as_its_float32_values(dtype):
    dpca, _ = fitted()
    x_ND = vectors(50, 12, seed=1).to(dtype)
    if dtype is not torch.float64:
        assert torch.equal(dpca.encode(x_ND), dpca.encode(x_ND.float()))
    assert torch.isfinite(dpca(x_ND).loss)
    assert DPCA(dpca.config).fit(x_ND)[-1] < 1


def test_no_rows():
    dpca, _ = fitted()
    digits_NL = dpca.encode(torch.zeros(0, 12))
    assert digits_NL.shape == (0, 11) and digits_NL.dtype == torch.int16
    assert dpca.decode(digits_NL).shape == (0, 12)
    # a process may have no rows in a job's last batch: its share of the loss is nothing, not NaN
    z_ND = torch.zeros(0, 12, requires_grad=True)
    quantized = dpca(z_ND)
    quantized.loss.backward()
    assert quantized.loss.item() == 0 and not dpca.basis_RD.grad.any()
    with pytest.raises(ValueError, match="vector"):
        dpca.fit(torch.zeros(0, 12))


def test_decode_of_a_prefix():
    dpca, _ = fitted("onehot:4,ternary*2", dim=3, n=100)
    digits_NL = torch.tensor([[2, 0, 1], [3, 2, 2]])
    mean, basis = dpca.mean_D, dpca.basis_RD.detach()
    expected = {
        0: [mean, mean],
        1: [mean + basis[2], mean + basis[3]],
        2: [mean + basis[2] - basis[4], mean + basis[3] + basis[4]],
        3: [mean + basis[2] - basis[4], mean + basis[3] + basis[4] + basis[5]],
    }
    for k, rows in expected.items():
        torch.testing.assert_close(dpca.decode(digits_NL, num_digits=k).detach(), torch.stack(rows))
    torch.testing.assert_close(dpca.decode(digits_NL).detach(), torch.stack(expected[3]))


def test_bad_digits_are_refused():
    dpca, _ = fitted("ternary*3", dim=3, n=50)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"num_digits .*{k}"):
            dpca.decode(torch.zeros(1, 3, dtype=torch.int64), num_digits=k)
    with pytest.raises(ValueError, match=r"shape \(1, 2\).* expected .*\[N, 3\]"):
        dpca.decode(torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("verb", ["encode", "fit"])
def test_bad_vectors_are_refused(verb):
    dpca, _ = fitted("ternary*3", dim=3, n=50)
    act = getattr(dpca, verb)
    x_ND = vectors(10, 3)
    for bad in (float("nan"), float("inf")):
        x_ND[7, 1] = x_ND[9, 0] = bad
        with pytest.raises(ValueError, match="row 7 holds a value that is not finite"):
            act(x_ND)
    with pytest.raises(ValueError, match=r"shape \(10, 2\).* expected .*\[N, 3\]"):
        act(x_ND[:, :2])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        act(x_ND[0])


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"stages": ()}, {"beam": 0}, {"iterations": -1}])
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError, match="at least"):
        DPCAConfig(**{"dim": 3} | wrong)
