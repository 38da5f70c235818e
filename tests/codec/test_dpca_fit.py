"""Fitting DPCA from chunks, from several processes, and against the normal equations."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from tests.codec.reference import vectors

STAGES = "onehot:8,ternary*5"


def untrained(stages=STAGES, **options):
    return DPCA(DPCAConfig(dim=8, stages=parse_stages(stages), **options))


def assert_same(dpca, errors, other, other_errors):
    np.testing.assert_allclose(errors, other_errors, rtol=1e-6)
    torch.testing.assert_close(dpca.mean_D, other.mean_D)
    torch.testing.assert_close(dpca.basis_RD, other.basis_RD, rtol=1e-4, atol=1e-5)


def test_chunks_of_any_size_give_the_basis_of_all_vectors(monkeypatch):
    x_ND = vectors(700, 8)
    whole = untrained()
    errors = whole.fit(x_ND)
    monkeypatch.setattr("sidrec_torchrec.codec.dpca_fit._BLOCK_ROWS", 64)
    for chunks in (list(x_ND.split(33)), [x_ND[:1], x_ND[1:1], x_ND[1:]], x_ND.split(700)):
        dpca = untrained()
        assert_same(dpca, dpca.fit(chunks), whole, errors)


def train_step(x_ND, z_ND):
    dpca = untrained()
    dpca.initialize(x_ND)
    z_ND = z_ND.clone().requires_grad_()
    output = dpca(z_ND)
    (output.z_q_ND.square().sum(1).mean() + output.loss).backward()
    return output.digits_NL, dpca.basis_RD.grad


def on_each_process(x_ND, first_rows):
    """Fits on this process's rows, takes a data-parallel step, and fits where process 0 has no rows."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dpca = untrained()
    errors = dpca.fit(x_ND[:first_rows] if rank == 0 else x_ND[first_rows:])
    digits_NL, grad_RD = train_step(x_ND, x_ND.chunk(size)[rank])
    dist.all_reduce(grad_RD)
    try:
        untrained().fit(x_ND[:0] if rank == 0 else x_ND)
        refused = ""
    except ValueError as error:
        refused = str(error)
    return {"fitted": dpca, "errors": errors, "digits": digits_NL, "grad": grad_RD / size, "refused": refused}


def test_two_processes_learn_what_one_learns(run_distributed, monkeypatch):
    x_ND = vectors(600, 8)
    first, second = run_distributed(on_each_process, 2, x_ND, 400)  # unequal shares

    single = untrained()
    with monkeypatch.context() as patch:
        # process 0 starts the basis from its own rows: give the single process the same start
        patch.setattr("sidrec_torchrec.codec.dpca_fit._SAMPLE_ROWS", 400)
        errors = single.fit(x_ND)
    for result in (first, second):
        assert_same(result["fitted"], result["errors"], single, errors)
    assert torch.equal(first["fitted"].basis_RD, second["fitted"].basis_RD)

    digits_NL, grad_RD = train_step(x_ND, x_ND)
    assert torch.equal(torch.cat([first["digits"], second["digits"]]), digits_NL)
    for result in (first, second):
        torch.testing.assert_close(result["grad"], grad_RD, rtol=1e-4, atol=1e-5)
        # all fail alike: none is left waiting for the others
        assert result["refused"] == "fit needs vectors, and process 0 was given none"


@pytest.mark.parametrize("beam", [1, 4])
def test_the_basis_solves_the_normal_equations_of_its_codes(beam):
    """A round is one least-squares problem; NumPy solves it from the code matrix itself."""
    x_ND = vectors(500, 8)
    start, after = untrained(iterations=0, beam=beam, ridge=1e-9), untrained(iterations=1, beam=beam, ridge=1e-9)
    start.fit(x_ND)
    after.fit(x_ND)
    digits = start.encode(x_ND).numpy()
    codes = np.concatenate([np.eye(8)[digits[:, 0]], digits[:, 1:] - 1.0], axis=1)
    centered = x_ND.double().numpy() - x_ND.double().numpy().mean(0)
    basis = np.linalg.lstsq(codes, centered, rcond=None)[0]
    energy = (codes[:, 8:] ** 2).sum(0) * (basis[8:] ** 2).sum(1)
    expected = np.concatenate([basis[:8], basis[8:][np.argsort(-energy)]])
    np.testing.assert_allclose(after.basis_RD.detach().numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("stages", ["ternary*10", "onehot:8*3", STAGES])
def test_the_basis_of_the_least_error_is_kept(stages):
    x_ND = vectors(600, 8)
    dpca = untrained(stages)
    errors = dpca.fit(x_ND)
    assert min(errors) < errors[0]
    left_ND = x_ND - dpca.decode(dpca.encode(x_ND)).detach()
    relative = left_ND.double().square().sum() / (x_ND - x_ND.mean(0)).double().square().sum()
    assert min(errors) == pytest.approx(relative.item(), rel=1e-4)


def test_fitting_with_a_beam_reaches_a_lower_error():
    x_ND = vectors(600, 8)
    assert min(untrained("onehot:8*3", beam=6).fit(x_ND)) < min(untrained("onehot:8*3").fit(x_ND))


def test_the_ridge_helps_vectors_not_seen():
    """Few vectors per codeword: without a pull to zero, codewords learn their noise."""

    def held_out_error(ridge):
        dpca = untrained("onehot:32*2,ternary*4", ridge=ridge)
        dpca.fit(vectors(300, 8))
        x_ND = vectors(300, 8, seed=1)
        return (x_ND - dpca.decode(dpca.encode(x_ND)).detach()).square().sum().item()

    assert held_out_error(1.0) < 0.97 * held_out_error(1e-9)


def test_equal_stages_are_ordered_by_energy():
    dpca = untrained("onehot:4*3,ternary*5")
    x_ND = vectors(600, 8)
    dpca.fit(x_ND)
    digits_NL = dpca.encode(x_ND).long()
    energy = [
        table[digits_NL[:, j]].square().sum().item() for j, table in enumerate(t.detach() for t in dpca.digit_tables())
    ]
    # the last re-encoding may move a little energy between neighbours
    for run in (energy[:3], energy[3:]):
        assert all(later < earlier * 1.1 for earlier, later in pairwise(run))


def test_an_iterator_is_refused_for_it_can_be_read_once_only():
    with pytest.raises(TypeError, match="give a list or another collection, not an iterator"):
        untrained().fit(chunk for chunk in [vectors(50, 8)])


def test_bad_rows_are_counted_over_all_chunks():
    chunks = [vectors(20, 8), vectors(20, 8)]
    chunks[1][3, 2] = float("nan")
    with pytest.raises(ValueError, match="row 23 holds a value that is not finite"):
        untrained().fit(chunks)
