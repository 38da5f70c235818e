"""How much of a predicted source content tells: what cannot be told is not worth digits."""

import torch
from torch import Tensor

from sidrec_torchrec.fusion.model import ItemTensors

_COMPONENTS, _FOLDS = 64, 5
_RIDGE = 0.1  # of the mean variance of a component


def share_told(items: ItemTensors, predicted: str) -> float:
    """The share of a source's variance that the other sources tell of items they have not met; at least 0.

    By ridge regression on their first 64 principal components, in five folds: a floor, for a tokenizer is not linear. What users do
    with items, say, is mostly chance where items have few events: SIDs that are to predict it learn it by heart, and lose content.

    Args:
        items: a sample, with the sources to read and the predicted one.
        predicted: its name.

    Returns:
        The coefficient of determination; 0 with fewer items than folds.
    """
    has_N = items.present[predicted]
    y_ND = items.sources[predicted][has_N].double()
    if len(y_ND) < _FOLDS:
        return 0.0
    parts = [
        _standardized(items.sources[name][has_N], items.present[name][has_N])
        for name in items.sources
        if name != predicted
    ]
    x_NK = _components(torch.cat(parts, dim=1))
    fold_N = torch.randperm(len(y_ND), generator=torch.Generator().manual_seed(0)).to(y_ND.device) % _FOLDS
    error = total = 0.0
    for fold in range(_FOLDS):
        held_N = fold_N == fold
        mean_K, mean_D = x_NK[~held_N].mean(0), y_ND[~held_N].mean(0)
        a_NK, b_ND = x_NK[~held_N] - mean_K, y_ND[~held_N] - mean_D
        gram_KK = a_NK.T @ a_NK
        gram_KK.diagonal().add_(_RIDGE * gram_KK.diagonal().mean() + 1e-12)
        map_KD = torch.linalg.solve(gram_KK, a_NK.T @ b_ND)
        rest_ND = y_ND[held_N] - mean_D
        error += float((rest_ND - (x_NK[held_N] - mean_K) @ map_KD).square().sum())
        total += float(rest_ND.square().sum())
    return max(0.0, 1 - error / total) if total else 0.0


def _standardized(x_ND: Tensor, has_N: Tensor) -> Tensor:
    """Centred, of total variance 1, float64; a missing vector is the mean."""
    x_ND = x_ND.double()
    if not has_N.any():
        return torch.zeros_like(x_ND)
    centred_ND = (x_ND - x_ND[has_N].mean(0)) * has_N.unsqueeze(1)
    return centred_ND / centred_ND.square().sum().div(has_N.sum()).sqrt().clamp_min(1e-12)


def _components(x_NE: Tensor) -> Tensor:
    """Its first principal components."""
    directions_EK = torch.linalg.eigh(x_NE.T @ x_NE).eigenvectors.flip(1)[:, :_COMPONENTS]
    return x_NE @ directions_EK
