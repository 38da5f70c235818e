"""The projection against principal components by singular values, and what of a vector comes back in the model."""

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, ArmInputs, base
from sidrec_torchrec.ranker.arms.projected import Int8Projection

ITEMS, DIM = 300, 32


@pytest.fixture
def sources():
    """Vectors of falling variance, turned so that no component is a column."""
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(ITEMS, 48)) * 0.9 ** np.arange(48) @ np.linalg.qr(rng.normal(size=(48, 48)))[0] + 0.3
    return [x_ND[:, :20].astype(np.float16), x_ND[:, 20:].astype(np.float16)]


def components(x_ND: np.ndarray, row_F: np.ndarray, dim: int) -> np.ndarray:
    """Of all rows, by the singular vectors of some; a component's sign is not determined."""
    centered_ND = x_ND - x_ND[row_F].mean(0)
    _, values, axes_DD = np.linalg.svd(centered_ND[row_F], full_matrices=False)
    scale = np.sqrt(np.square(values[:dim]).sum() / (dim * len(row_F)))
    return centered_ND @ axes_DD[:dim].T / scale


def decoded(arm, item_N: np.ndarray) -> np.ndarray:
    values = arm.values(item_N)["projection"]
    lengths = torch.full((len(item_N),), values.shape[1])
    batch = KeyedJaggedTensor(keys=["projection"], values=values.flatten(), lengths=lengths)
    return arm.module(torch.device("cpu"))(batch).numpy()


@pytest.mark.parametrize("block_items", [64, 10_000])
def test_events_carry_principal_components_of_what_training_has(block_items, sources, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_BLOCK_ITEMS", block_items)
    events_N = np.random.default_rng(1).integers(3, size=ITEMS)
    np.save(tmp_path / "events.npy", events_N)
    for name, array in zip("ab", sources, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    vectors = {name: tmp_path / f"{name}.npy" for name in "ab"}
    inputs = ArmInputs(num_items=ITEMS, vectors=vectors, training_events=tmp_path / "events.npy")
    arm = ARMS["projected"](inputs, ArmConfig())
    item_N = np.arange(ITEMS)
    values = arm.values(item_N)["projection"]
    assert values.shape == (ITEMS, DIM) and values.dtype == torch.int8

    row_F = np.flatnonzero(events_N)
    expected_NK = components(np.concatenate(sources, axis=1).astype(np.float64), row_F, DIM)
    largest_K = np.abs(expected_NK[row_F]).max(0)
    expected_NK = expected_NK.clip(-largest_K, largest_K)
    decoded_NK = decoded(arm, item_N)
    signs_K = np.sign((decoded_NK * expected_NK).sum(0))
    error_NK = np.abs(decoded_NK * signs_K - expected_NK)
    assert (error_NK <= largest_K / 127 * 0.501).all()  # half a level
    assert np.square(decoded_NK[row_F]).mean() == pytest.approx(1, abs=0.01)
    assert (values[row_F].abs().max(0).values == 127).all()  # every component uses its whole range

    column = arm.stored(item_N)["projection"]
    assert column.type.value_type == "int8"
    np.testing.assert_array_equal(column.to_pylist(), values.numpy())


def test_an_axis_and_its_opposite_are_one(sources):
    flipped = [-array for array in sources]
    one, other = (Int8Projection.fit(s, np.arange(ITEMS), DIM) for s in (sources, flipped))
    np.testing.assert_allclose(one.axes_DK, other.axes_DK, atol=1e-9)


def test_components_that_do_not_vary_say_nothing():
    x_ND = np.outer(np.arange(50), np.random.default_rng(0).normal(size=6))  # one component, and rounding errors
    projection = Int8Projection.fit([x_ND], np.arange(50), 4)
    values_NK = projection.of([x_ND])
    assert values_NK.shape == (50, 4) and (values_NK[:, 1:] == 0).all() and len(set(values_NK[:, 0])) == 50
    constant = [np.ones((5, 3), np.float16)]
    assert not Int8Projection.fit(constant, np.arange(5), 32).of(constant).any()


def test_something_must_be_looked_at(sources):
    with pytest.raises(ValueError, match="at least one item"):
        Int8Projection.fit(sources, np.arange(0), DIM)
