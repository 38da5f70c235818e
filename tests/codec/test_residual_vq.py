"""Residual VQ against brute force, DPCA, faiss and its update rule by hand."""

import faiss
import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.residual_vq import ResidualVQ, ResidualVQConfig
from tests.codec.reference import faiss_codes_agree, greedy_digits, vectors


def started(k=16, stages=3, dim=8, n=500, **options):
    vq = ResidualVQ(ResidualVQConfig(dim=dim, codebook_size=k, num_stages=stages, **options))
    vq.initialize(vectors(n, dim))
    return vq


def test_encode_is_greedy_and_is_dpca_with_one_hot_stages():
    vq, x_ND = started(), vectors(300, 8, seed=1)
    digits_NL = vq.encode(x_ND)
    assert digits_NL.dtype == torch.int16
    np.testing.assert_array_equal(digits_NL.numpy(), greedy_digits(vq, x_ND))
    dpca = DPCA(DPCAConfig(dim=8, stages=parse_stages("onehot:16*3")))
    with torch.no_grad():
        dpca.basis_RD.copy_(vq.codebook_LKD.flatten(0, 1))
    assert torch.equal(dpca.encode(x_ND), digits_NL)
    torch.testing.assert_close(dpca.decode(digits_NL).detach(), vq.decode(digits_NL))


def test_codebooks_of_faiss_give_the_codes_of_faiss():
    x_ND = vectors(800, 8)
    rq = faiss.ResidualQuantizer(8, 3, 4)
    rq.max_beam_size = 1
    rq.train(x_ND.numpy())
    codebooks = faiss.vector_to_array(rq.codebooks).reshape(3, 16, 8)
    vq = ResidualVQ(ResidualVQConfig(dim=8, codebook_size=16, num_stages=3))
    vq.codebook_LKD.copy_(torch.from_numpy(codebooks))
    codes = faiss.unpack_bitstrings(rq.compute_codes(x_ND.numpy()), 3, 4)
    assert faiss_codes_agree(codes, vq.encode(x_ND).numpy(), codebooks, x_ND.numpy()) > 0.99


def test_start_is_as_good_as_faiss():
    x_ND = vectors(800, 8)
    rq = faiss.ResidualQuantizer(8, 3, 4)
    rq.max_beam_size = 1
    rq.train(x_ND.numpy())
    faiss_error = ((x_ND.numpy() - rq.decode(rq.compute_codes(x_ND.numpy()))) ** 2).sum()
    vq = ResidualVQ(ResidualVQConfig(dim=8, codebook_size=16, num_stages=3))
    vq.initialize(x_ND)
    assert (x_ND - vq.decode(vq.encode(x_ND))).square().sum() < 1.1 * faiss_error


@pytest.mark.parametrize("rows", [500, 3])
def test_digits_do_not_depend_on_the_batch(rows):
    """With 3 rows the 16 codewords repeat, and every distance ties."""
    vq, x_ND = started(n=rows), vectors(150, 8, seed=1)
    together_NL = vq.encode(x_ND)
    for size in (1, 2, 7, 64):
        assert torch.equal(torch.cat([vq.encode(part) for part in x_ND.split(size)]), together_NL)


def test_initialize_gives_the_same_quantizer_each_time():
    first, second = started().state_dict(), started().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def update_by_hand(state, x, digits, decay):
    """Codewords as moving averages of the residuals they get, in NumPy float64."""
    counts, sums, codebooks = (state[name].double().numpy().copy() for name in ("count_LK", "sum_LKD", "codebook_LKD"))
    residual, used, (stages, k) = x.astype(np.float64), codebooks.copy(), counts.shape
    for stage in range(stages):
        for codeword in range(k):
            mine = digits[:, stage] == codeword
            scale = k / len(x)
            counts[stage, codeword] = decay * counts[stage, codeword] + (1 - decay) * scale * mine.sum()
            sums[stage, codeword] = decay * sums[stage, codeword] + (1 - decay) * scale * residual[mine].sum(0)
            codebooks[stage, codeword] = sums[stage, codeword] / counts[stage, codeword]
        residual = residual - used[stage][digits[:, stage]]
    return counts, sums, codebooks


def test_update_is_the_moving_average_of_the_residuals():
    vq = started(decay=0.8, dead_share=0.0)
    for step in range(3):
        before = {name: value.clone() for name, value in vq.state_dict().items()}
        x_ND = vectors(200, 8, seed=step + 1)
        quantized = vq.train()(x_ND)
        expected = update_by_hand(before, x_ND.numpy(), quantized.digits_NL.numpy(), 0.8)
        for name, value in zip(("count_LK", "sum_LKD", "codebook_LKD"), expected, strict=True):
            np.testing.assert_allclose(vq.state_dict()[name].numpy(), value, rtol=1e-4, atol=1e-5)


def test_evaluation_leaves_the_codebooks_alone():
    vq = started().eval()
    before = {name: value.clone() for name, value in vq.state_dict().items()}
    vq(vectors(100, 8, seed=1))
    assert all(torch.equal(before[name], value) for name, value in vq.state_dict().items())


def test_gradient_passes_straight_through_with_commitment_of_the_input():
    vq = started(commitment=0.5).eval()
    z_ND, weights_ND = vectors(20, 8, seed=1).requires_grad_(), vectors(20, 8, seed=2)
    quantized = vq(z_ND)
    torch.testing.assert_close(quantized.z_q_ND, vq.decode(quantized.digits_NL))
    ((quantized.z_q_ND * weights_ND).sum() + quantized.loss).backward()
    left_ND = (z_ND - vq.decode(quantized.digits_NL)).detach()
    assert quantized.loss.item() == pytest.approx(0.5 * left_ND.square().sum(1).mean().item(), rel=1e-5)
    torch.testing.assert_close(z_ND.grad, weights_ND + 0.5 * 2 * left_ND / 20)


def test_dead_codewords_move_to_residuals_of_the_batch_and_are_used_again():
    vq = started(k=8, stages=2, decay=0.5, dead_share=0.05)
    vq.codebook_LKD[:, 5] = vq.sum_LKD[:, 5] = 1e4  # too far for any row
    vq.count_LK[:, 5] = 0.01
    x_ND = vectors(100, 8, seed=1)
    first_codewords_KD = vq.codebook_LKD[0].clone()
    digits_NL = vq.train()(x_ND).digits_NL.long()
    assert not (digits_NL == 5).any()
    residuals = (x_ND, x_ND - first_codewords_KD[digits_NL[:, 0]])
    for stage, residual_ND in enumerate(residuals):
        assert (residual_ND == vq.codebook_LKD[stage, 5]).all(1).any()
        assert vq.count_LK[stage, 5] == 1
    assert (vq.encode(x_ND)[:, 0] == 5).any()


def test_no_codeword_stays_dead_when_the_data_moves():
    vq = started(k=16, stages=2, decay=0.5)
    for step in range(30):
        vq.train()(vectors(200, 8, seed=step) + 40)
    digits_NL = vq.encode(vectors(2000, 8, seed=99) + 40)
    assert all(len(digit_N.unique()) == 16 for digit_N in digits_NL.T)


def updated_state(rank, world_size, num_rows, dead_share):
    """The state after three updates from one process's share of each batch."""
    vq = started(decay=0.8, dead_share=dead_share).train()
    for step in range(3):
        vq(vectors(num_rows, 8, seed=step + 1)[rank::world_size])
    return vq.state_dict()


def updated_states_of_two():
    rank = torch.distributed.get_rank()
    # of even shares without revival, and of one row for both, with revival
    return updated_state(rank, 2, 201, 0.0), updated_state(rank, 2, 1, 0.5)


def test_two_processes_update_as_one_with_their_batches_together_and_revive_alike(run_distributed):
    (first, first_revived), (second, second_revived) = run_distributed(updated_states_of_two, 2)
    for name, value in updated_state(0, 1, 201, 0.0).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    for name, value in first_revived.items():
        assert torch.isfinite(value).all() and torch.equal(value, second_revived[name])


@pytest.mark.parametrize("x_ND", [vectors(5, 8), torch.full((40, 8), 0.1), torch.zeros(40, 8)])
def test_few_distinct_vectors_are_learned_exactly(x_ND):
    vq = ResidualVQ(ResidualVQConfig(dim=8, codebook_size=16, num_stages=2))
    vq.initialize(x_ND)
    torch.testing.assert_close(vq.decode(vq.encode(x_ND)), x_ND)
    assert torch.isfinite(vq.train()(x_ND).loss) and torch.isfinite(vq.codebook_LKD).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_trains(dtype):
    vq = started().train()
    x_ND = vectors(100, 8, seed=1).to(dtype)
    if dtype is not torch.float64:
        assert torch.equal(vq.encode(x_ND), vq.encode(x_ND.float()))
    assert torch.isfinite(vq(x_ND).loss)
    assert torch.isfinite(vq.codebook_LKD).all()


def test_no_rows():
    vq = started().eval()
    digits_NL = vq.encode(torch.zeros(0, 8))
    assert digits_NL.shape == (0, 3) and digits_NL.dtype == torch.int16
    assert vq.decode(digits_NL).shape == (0, 8)
    assert vq(torch.zeros(0, 8)).loss.item() == 0
    with pytest.raises(ValueError, match="vector"):
        vq.initialize(torch.zeros(0, 8))


@pytest.mark.parametrize("verb", ["encode", "initialize"])
def test_bad_vectors_are_refused(verb):
    act = getattr(started(), verb)
    x_ND = vectors(10, 8)
    x_ND[7, 1] = float("nan")
    with pytest.raises(ValueError, match="row 7 holds a value that is not finite"):
        act(x_ND)
    with pytest.raises(ValueError, match=r"shape \(10, 3\).* expected .*\[N, 8\]"):
        act(x_ND[:, :3])


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"num_stages": 0}, {"decay": 1.0}, {"decay": -0.1}])
def test_impossible_configs_are_refused(wrong):
    with pytest.raises(ValueError, match="decay"):
        ResidualVQConfig(**{"dim": 3} | wrong)


def test_impossible_codebook_size_is_refused():
    with pytest.raises(ValueError, match="got 1"):
        ResidualVQ(ResidualVQConfig(dim=3, codebook_size=1))
