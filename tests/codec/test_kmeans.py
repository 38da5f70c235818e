"""k-means where it is easy to check, and where there is too little data."""

import numpy as np
import torch

from sidrec_torchrec.codec.kmeans import kmeans


def sorted_rows(x):
    return np.array(sorted(map(tuple, np.asarray(x))))


def test_separated_clusters_get_their_means():
    rng = np.random.default_rng(0)
    centers = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
    x = centers[:, None] + rng.standard_normal((4, 30, 2))
    found = kmeans(torch.from_numpy(x.reshape(-1, 2)), 4, seed=0)
    np.testing.assert_allclose(sorted_rows(found), sorted_rows(x.mean(1)), rtol=1e-9)


def test_every_distinct_row_is_a_centroid_where_there_are_fewer_than_centroids():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [1.0, 2.0]])
    found = kmeans(x, 16, seed=0)
    assert found.shape == (16, 2)
    assert {tuple(row) for row in found.tolist()} == {(1.0, 2.0), (3.0, 4.0), (5.0, 6.0)}


def test_constant_rows_make_constant_centroids():
    assert torch.equal(kmeans(torch.full((3, 2), 5.0), 8, seed=0), torch.full((8, 2), 5.0))


def test_same_seed_gives_the_same_centroids():
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(kmeans(x, 8, seed=3), kmeans(x, 8, seed=3))
