"""Fitting DPCA from chunks, from several processes, and against the normal equations."""

import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist

from sidrec_torchrec.codec import dpca_fit
from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.errors import DataError, RunMismatchError
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
def test_the_first_round_solves_the_ridge_problem_of_its_codes(beam):
    """A round is one least-squares problem, at first of ridge 1; NumPy solves it from the code matrix itself."""
    x_ND = vectors(500, 8)
    start, after = untrained(iterations=0, beam=beam), untrained(iterations=1, beam=beam)
    start.fit(x_ND)
    after.fit(x_ND)
    digits = start.encode(x_ND).numpy()
    codes = np.concatenate([np.eye(8)[digits[:, 0]], digits[:, 1:] - 1.0], axis=1)
    centered = x_ND.double().numpy() - x_ND.double().numpy().mean(0)
    basis = np.linalg.solve(codes.T @ codes + np.eye(13), codes.T @ centered)
    energy = (codes[:, 8:] ** 2).sum(0) * (basis[8:] ** 2).sum(1)
    expected = np.concatenate([basis[:8], basis[8:][np.argsort(-energy)]])
    np.testing.assert_allclose(after.basis_RD.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_fitting_with_a_beam_reaches_a_lower_error():
    x_ND = vectors(600, 8)
    assert untrained("onehot:8*3", beam=6).fit(x_ND)[-1] < untrained("onehot:8*3").fit(x_ND)[-1]


@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_fit_cut_off_after_any_round_goes_on_to_the_very_same_result(tmp_path, monkeypatch, done):
    x_ND, options = vectors(400, 8), {"iterations": 6, "beam": 2}
    whole = untrained(**options)
    errors = whole.fit(x_ND)

    calls = []

    def die_after(*arguments):
        calls.append(arguments)
        if len(calls) > done:
            raise KeyboardInterrupt
        return sums(*arguments)

    sums, path, resumed = dpca_fit._sums, tmp_path / "fit.pt", untrained(**options)
    with monkeypatch.context() as patch:
        patch.setattr(dpca_fit, "_sums", die_after)
        with pytest.raises(KeyboardInterrupt):
            untrained(**options).fit(x_ND, checkpoint=path)
    assert resumed.fit(chunks := CountedChunks(x_ND), checkpoint=path) == errors
    assert chunks.times_read == 7 - done  # neither the survey nor a round is done again
    assert torch.equal(resumed.basis_RD, whole.basis_RD) and torch.equal(resumed.mean_D, whole.mean_D)
    assert [file.name for file in tmp_path.iterdir()] == ["fit.pt"]

    again = untrained(**options)
    assert again.fit([], checkpoint=path) == errors and torch.equal(again.basis_RD, whole.basis_RD)


class CountedChunks:
    """One chunk, and how often it was read."""

    def __init__(self, x_ND):
        self.x_ND, self.times_read = x_ND, 0

    def __iter__(self):
        yield self.x_ND
        self.times_read += 1


def test_a_flipped_bit_in_a_checkpoint_is_seen_or_changes_nothing(tmp_path):
    path = tmp_path / "fit.pt"
    whole = untrained(iterations=1)
    errors = whole.fit(vectors(100, 8), checkpoint=path)
    content, seen = path.read_bytes(), 0
    for place in range(3, len(content), 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        again = untrained(iterations=1)
        try:
            assert again.fit(vectors(100, 8), checkpoint=path) == errors
            assert torch.equal(again.basis_RD, whole.basis_RD)
        except (DataError, RunMismatchError):
            seen += 1
    assert seen > 10


def test_a_checkpoint_of_another_fit_or_a_broken_one_is_refused(tmp_path):
    path = tmp_path / "fit.pt"
    untrained(iterations=1).fit(vectors(100, 8), checkpoint=path)
    with pytest.raises(RunMismatchError, match=r"fit\.pt is of another fit: .*seed=0.*seed=1"):
        untrained(iterations=1, seed=1).fit(vectors(100, 8), checkpoint=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match=r"fit\.pt: not a checkpoint of fit, or a broken one"):
        untrained(iterations=1).fit(vectors(100, 8), checkpoint=path)


def test_chunks_are_held_one_block_at_a_time(monkeypatch):
    """What fit keeps of a chunk is its sums and the sample, or memory would grow with the corpus."""
    monkeypatch.setattr(dpca_fit, "_SAMPLE_ROWS", 64)
    shards = []

    class Shards:
        def __iter__(self):
            for seed in range(6):
                shard = vectors(64, 8, seed=seed).double().numpy()  # float64 is not copied: a view of it would keep it
                shards.append(weakref.ref(shard))
                yield torch.from_numpy(shard)
                assert sum(shard() is not None for shard in shards) <= 2

    assert len(untrained(iterations=2).fit(Shards())) == 3


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
