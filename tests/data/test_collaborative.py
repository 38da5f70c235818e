"""Collaborative vectors against a dense singular value decomposition in numpy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.collaborative import CollaborativeConfig, CollaborativeVectors, collaborative_vectors
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequence_files import HANDS, open_sequences
from sidrec_torchrec.data.sequences import from_table
from sidrec_torchrec.errors import DataError

ITEMS, USERS, EVENTS = 30, 80, 60
CONFIG = CollaborativeConfig(dim=4, passes=40, prior_events=3.0, least_events=20)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """Two kinds of users like two kinds of items; item 7 is good, item 8 bad, item 29 rare; several row groups."""
    folder = tmp_path_factory.mktemp("collaborative")
    rng = np.random.default_rng(0)
    user_N = np.repeat(np.arange(USERS), EVENTS)
    item_N = rng.integers(0, ITEMS - 1, len(user_N))
    item_N[:3] = ITEMS - 1
    logit_N = np.where(user_N % 2 == item_N % 2, 1.5, -1.5) + 2 * (item_N == 7) - 2 * (item_N == 8)
    events = {
        "user_id": user_N,
        "item_id": item_N,
        "timestamp": np.arange(len(user_N)),
        "label": (rng.random(len(user_N)) < 1 / (1 + np.exp(-logit_N))).astype(np.int8),
    }
    pq.write_table(pa.table({"item_id": np.arange(ITEMS)}), folder / "items.parquet")
    pq.write_table(pa.table(events), folder / "events.parquet")
    config = PrepareConfig(cold_fraction=0.0, targets_per_row=20, max_history=30)
    prepared = prepare(folder, folder / "sequences", config)
    with open_sequences(prepared.path("train")) as files:
        assert files.num_groups == HANDS
    return prepared


def by_numpy(prepared: Prepared, config: CollaborativeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, mean deviations, and the Gram matrix of the best rank-3 approximation to the weighted residuals; scaled."""
    rows = [
        (row.item[-row.num_targets :], row.action[-row.num_targets :].astype(float))
        for row in from_table(pq.read_table(prepared.path("train")))
    ]
    count_N, sum_N = np.zeros(ITEMS), np.zeros(ITEMS)
    for item_P, label_P in rows:
        np.add.at(count_N, item_P, 1)
        np.add.at(sum_N, item_P, label_P)
    average, prior = sum_N.sum() / count_N.sum(), config.prior_events
    mean_N = (sum_N + prior * average) / (count_N + prior)
    residual_RN = np.zeros((len(rows), ITEMS))
    for r, (item_P, label_P) in enumerate(rows):
        own_P = label_P - mean_N[item_P]
        np.add.at(residual_RN[r], item_P, own_P - own_P.sum() / (len(own_P) + prior))
    present_N = count_N >= config.least_events
    residual_RN *= present_N / np.sqrt(count_N + 4 * prior)
    _, s_K, v_KN = np.linalg.svd(residual_RN, full_matrices=False)
    k = config.dim - 1
    deviation_N, factors_NK = (mean_N - average) * present_N, v_KN[:k].T * s_K[:k]
    factors_NK /= factors_NK[present_N].var(0).sum() ** 0.5
    return count_N, deviation_N / deviation_N[present_N].std(), factors_NK @ factors_NK.T


def test_vectors_are_those_of_the_decomposition(prepared):
    vectors = collaborative_vectors(prepared, CONFIG)
    count_N, deviation_N, gram_NN = by_numpy(prepared, CONFIG)
    np.testing.assert_array_equal(vectors.present_N, count_N >= 20)
    assert vectors.present_N.sum() == ITEMS - 1 and not vectors.values_ND[-1].any()
    np.testing.assert_allclose(vectors.values_ND[:, 0], deviation_N, atol=1e-5)
    factors_NK = vectors.values_ND[:, 1:].astype(float)
    np.testing.assert_allclose(factors_NK @ factors_NK.T, gram_NN, atol=1e-5 * np.abs(gram_NN).max())


def test_like_items_have_like_vectors(prepared):
    x_ND = collaborative_vectors(prepared, CONFIG).values_ND[:-1, 1:]
    cosine_NN = (x_ND @ x_ND.T) / np.linalg.norm(x_ND, axis=1) / np.linalg.norm(x_ND, axis=1)[:, None]
    same_NN = np.arange(ITEMS - 1) % 2 == (np.arange(ITEMS - 1) % 2)[:, None]
    assert cosine_NN[same_NN].mean() > cosine_NN[~same_NN].mean() + 0.5
    deviation_N = collaborative_vectors(prepared, CONFIG).values_ND[:, 0]
    assert deviation_N.argmax() == 7 and deviation_N.argmin() == 8


def work(prepared: Prepared) -> CollaborativeVectors:
    import torch.distributed as dist

    return collaborative_vectors(prepared, CONFIG, rank=dist.get_rank(), world_size=dist.get_world_size())


def test_processes_share_the_work(prepared, run_distributed):
    alone = collaborative_vectors(prepared, CONFIG)
    results = run_distributed(work, 2, prepared)
    gram_NN = alone.values_ND @ alone.values_ND.T
    for result in results:
        np.testing.assert_array_equal(result.present_N, alone.present_N)
        np.testing.assert_allclose(result.values_ND @ result.values_ND.T, gram_NN, atol=1e-5 * np.abs(gram_NN).max())


def test_too_few_events(prepared: Prepared, tmp_path: Path):
    with pytest.raises(DataError, match=r"train: no item has 5000 training targets; lower least_events"):
        collaborative_vectors(prepared, CollaborativeConfig(least_events=5000))
    with pytest.raises(ValueError, match="dim must be at least 2"):
        CollaborativeConfig(dim=1)


def of_events(folder: Path, item_N: np.ndarray, label_N: np.ndarray) -> Prepared:
    """Prepared sequences of users with 30 events each."""
    events = {
        "user_id": np.arange(len(item_N)) // 30,
        "item_id": item_N,
        "timestamp": np.arange(len(item_N)),
        "label": label_N.astype(np.int8),
    }
    pq.write_table(pa.table({"item_id": np.arange(10)}), folder / "items.parquet")
    pq.write_table(pa.table(events), folder / "events.parquet")
    return prepare(folder, folder / "sequences", PrepareConfig(cold_fraction=0.0, validation_fraction=0.0))


def test_labels_that_tell_no_item_from_another_are_refused(tmp_path):
    """All training labels 1: zeros for vectors, which readers of the column would take for none at all."""
    rng = np.random.default_rng(0)
    is_test_N = np.arange(600) % 30 >= 24
    prepared = of_events(tmp_path, rng.integers(0, 10, 600), np.where(is_test_N, rng.integers(0, 2, 600), 1))
    with pytest.raises(DataError, match=r"train: the labels .* tell no item from another; do without"):
        collaborative_vectors(prepared, CollaborativeConfig())


def test_rounding_is_not_scaled_to_a_signal(tmp_path):
    """Every item is liked by a third, some met twice as often: means differ in their last bits, or not at all."""
    rng = np.random.default_rng(0)
    once = [(item, label) for item in range(10) for label in (1, 0, 0) for _ in range(1 + item % 2 * 2)]
    item_N, label_N, places = np.zeros(600, int), np.zeros(600, int), np.flatnonzero(np.arange(600) % 30 < 24)
    pairs = [once[i % len(once)] for i in range(len(places))]
    rng.shuffle(pairs)
    item_N[places], label_N[places] = np.array(pairs).T
    vectors = collaborative_vectors(of_events(tmp_path, item_N, label_N), CollaborativeConfig(prior_events=5.0))
    assert vectors.present_N.all()
    assert not vectors.values_ND[:, 0].any() and vectors.values_ND[:, 1:].any()
