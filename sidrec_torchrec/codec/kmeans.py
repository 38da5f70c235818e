"""k-means, to start codebooks."""

import torch
from torch import Tensor


def kmeans(x_ND: Tensor, k: int, *, seed: int, iterations: int = 20) -> Tensor:
    """Lloyd's algorithm from a k-means++ start (Arthur & Vassilvitskii 2007); empty clusters move to the worst rows.

    Args:
        x_ND: float [N, D], at least one row.
        k: number of centroids; with fewer distinct rows, some centroids repeat.
        seed: of the start.
        iterations: rounds of Lloyd's algorithm.

    Returns:
        float [k, D].
    """
    generator = torch.Generator().manual_seed(seed)
    centroids_KD = _plus_plus(x_ND, k, generator)
    for _ in range(iterations):
        distance_N, nearest_N = torch.cdist(x_ND, centroids_KD).min(1)
        count_K = torch.bincount(nearest_N, minlength=k)
        sum_KD = torch.zeros_like(centroids_KD).index_add_(0, nearest_N, x_ND)
        # more clusters may be empty than there are rows to move to: those stay where they are
        centroids_KD = torch.where(count_K.unsqueeze(1) > 0, sum_KD / count_K.clamp_min(1).unsqueeze(1), centroids_KD)
        empty_E = (count_K == 0).nonzero().squeeze(1)
        if len(empty_E):
            worst = distance_N.topk(min(len(empty_E), len(x_ND))).indices
            centroids_KD[empty_E[: len(worst)]] = x_ND[worst]
    return centroids_KD


def _plus_plus(x_ND: Tensor, k: int, generator: torch.Generator) -> Tensor:
    chosen = [int(torch.randint(len(x_ND), (), generator=generator))]
    norm_N = x_ND.square().sum(1)
    distance_N = _distance(x_ND, norm_N, chosen[0])
    for _ in range(1, k):
        weight_N = distance_N.double().cpu()
        total = float(weight_N.sum())
        if total > 0:
            mark = torch.rand((), generator=generator, dtype=torch.float64) * total
            row = int(torch.searchsorted(weight_N.cumsum(0), mark).clamp_max(len(x_ND) - 1))
        else:
            row = int(torch.randint(len(x_ND), (), generator=generator))
        chosen.append(row)
        distance_N = torch.minimum(distance_N, _distance(x_ND, norm_N, row))
    return x_ND[chosen].clone()


def _distance(x_ND: Tensor, norm_N: Tensor, row: int) -> Tensor:
    """Squared distances to a row, [N], from one product; exactly 0 for its repetitions, which rounding must not draw."""
    sum_N = norm_N + norm_N[row]
    distance_N = sum_N - 2 * (x_ND @ x_ND[row])
    return torch.where(distance_N > 8 * torch.finfo(x_ND.dtype).eps * sum_N, distance_N, 0)
