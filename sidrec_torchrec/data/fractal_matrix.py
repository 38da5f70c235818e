"""The matrix of a fractal expansion: a log of users and items, reduced to a small one like it, and who is like whom.

Source: Belletti, Lakshmanan et al. 2019, "Scalable Realistic Recommendation Datasets through Fractal Expansions" (arXiv
1901.08910).
"""

from dataclasses import dataclass

import numpy as np
import torch

_PASSES = 8
_SPARE = 8  # columns more than are asked for, which make the iteration converge
_LEAST, _MOST = 0.01, 0.95  # no block is empty, and none a copy


@dataclass(frozen=True)
class Reduced:
    """A log's matrix in small.

    Args:
        keep_AB: float64 [users_times, items_times], each in [0.01, 0.95]: the share of the log's events that stay in
            block (a, b); proportional to the reduced matrix' absolute values but for the bounds.
        user_order_U: int64 [U], the users so that those of like taste are neighbours.
        item_order_I: int64 [I], likewise the items, by who meets them.
    """

    keep_AB: np.ndarray
    user_order_U: np.ndarray
    item_order_I: np.ndarray


def reduce_log(
    user_N: np.ndarray,
    item_N: np.ndarray,
    value_N: np.ndarray,
    shape: tuple[int, int],
    times: tuple[int, int],
    kept: float,
    seed: int,
) -> Reduced:
    """Reduces users times items to ``times``, keeping the leading singular values.

    With R = U S V^T, cut to k = min(times) singular values, the rows of U (of V) are averaged over groups of like users
    (items), and what comes of it is made orthonormal again; the reduced matrix is their product with the same S (the
    paper's algorithm 2).

    Args:
        user_N, item_N: int64 [N], of each event.
        value_N: float [N], what the event says; of several with the same user and item the sum counts, cut to [-1, 1].
        shape: number of users and of items, neither less than its factor of ``times``.
        times: rows and columns of the reduced matrix.
        kept: mean of ``keep_AB``, in [0.01, 0.95].
        seed: of the iteration's start.
    """
    u_UK, s_K, v_IK = _truncated_svd(user_N, item_N, value_N, shape, min(times), seed)
    orders = [likeness_order(x_NK * s_K, -(-len(x_NK) // n)) for x_NK, n in zip((u_UK, v_IK), times, strict=True)]
    small = [_reduced_rows(x_NK, order, n) for x_NK, order, n in zip((u_UK, v_IK), orders, times, strict=True)]
    reduced_AB = (small[0] * s_K) @ small[1].T
    user_order, item_order = (likeness_order(x_NK * s_K, 1) for x_NK in (u_UK, v_IK))
    return Reduced(_shares(np.abs(reduced_AB), kept), user_order, item_order)


def likeness_order(x_NK: np.ndarray, size: int) -> np.ndarray:
    """An order of N rows in which each ``size`` neighbours from the first on are alike: leaves of a k-d tree; int64 [N]."""
    leaves, waiting = [], [np.arange(len(x_NK))]
    while waiting:
        rows = waiting.pop()
        if len(rows) <= size:
            leaves.append(rows)
            continue
        axis = int(x_NK[rows].var(axis=0).argmax())
        rows = rows[np.argsort(x_NK[rows, axis], kind="stable")]
        middle = size * max(1, len(rows) // size // 2)
        waiting += [rows[middle:], rows[:middle]]
    return np.concatenate(leaves)


def shuffled_among_likes(order_N: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation that moves each row within its ``size`` neighbours of an order, int64 [len(order_N)].

    Returns:
        By place in ``order_N``: the row that its row becomes.
    """
    group_N = np.arange(len(order_N)) // size
    return order_N[np.lexsort((rng.random(len(order_N)), group_N))]


def _shares(size_AB: np.ndarray, kept: float) -> np.ndarray:
    """In proportion to sizes, cut to the bounds, of this mean."""
    low, high = 0.0, _MOST / max(size_AB.min(), 1e-12 * size_AB.max())
    for _ in range(100):
        middle = (low + high) / 2
        is_less = np.clip(middle * size_AB, _LEAST, _MOST).mean() < kept
        low, high = (middle, high) if is_less else (low, middle)
    return np.clip(high * size_AB, _LEAST, _MOST)


def _reduced_rows(x_NK: np.ndarray, order_N: np.ndarray, count: int) -> np.ndarray:
    """Means of ``count`` groups of rows, then the nearest matrix of orthonormal columns; float64 [count, K]."""
    means_AK = np.stack([x_NK[rows].mean(axis=0) for rows in np.array_split(order_N, count)])
    left, _, right = np.linalg.svd(means_AK, full_matrices=False)
    return left @ right


def _truncated_svd(
    user_N: np.ndarray, item_N: np.ndarray, value_N: np.ndarray, shape: tuple[int, int], rank: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ``rank`` leading singular vectors and values, by subspace iteration (Halko et al. 2011, algorithm 4.4)."""
    indices_2N = torch.from_numpy(np.stack([user_N, item_N]).astype(np.int64))
    r_UI = torch.sparse_coo_tensor(
        indices_2N, torch.from_numpy(value_N.astype(np.float64)), shape, check_invariants=False
    ).coalesce()
    r_UI = torch.sparse_coo_tensor(
        r_UI.indices(), r_UI.values().clamp(-1, 1), shape, check_invariants=False, is_coalesced=True
    )
    r_IU = r_UI.t().coalesce()
    generator = torch.Generator().manual_seed(seed)
    q_IW = torch.randn(shape[1], min(rank + _SPARE, *shape), generator=generator, dtype=torch.float64)
    for _ in range(_PASSES):
        q_UW = torch.linalg.qr(torch.sparse.mm(r_UI, q_IW))[0]
        q_IW = torch.linalg.qr(torch.sparse.mm(r_IU, q_UW))[0]
    left, s_W, right = torch.linalg.svd(torch.sparse.mm(r_UI, q_IW), full_matrices=False)
    return left[:, :rank].numpy(), s_W[:rank].numpy(), (q_IW @ right.T)[:, :rank].numpy()
