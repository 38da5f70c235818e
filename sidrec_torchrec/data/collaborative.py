"""What users do with items, as a vector per item: for tokenizers to predict, so that SIDs tell what users tell apart.

A target's *residual* is its label (of the first task, where there are several) less the item's mean and the user's mean
deviation, both drawn towards the average of few events. An item's vector is its own mean deviation, and its row in the best
approximation of rank ``dim - 1`` to users times items of residuals: items that the same users like more than others do, have
like vectors. Both parts are scaled to the same total variance, so that neither drowns the other.

Source: latent semantic analysis (Deerwester et al. 1990) of centered ratings; subspace iteration as in Halko et al. 2011,
algorithm 4.4.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.data.tasks import UNKNOWN, label_of
from sidrec_torchrec.errors import DataError, check_at_least
from sidrec_torchrec.processes import sum_over_processes

_NOISE = 1e-20  # variance of what rounding alone makes differ: labels are 0 or 1
_SPARE = 8  # columns more than are asked for, which make the iteration converge


@dataclass(frozen=True, kw_only=True)
class CollaborativeConfig:
    """How residuals become vectors.

    Args:
        dim: width of the vectors.
        passes: over the training sequences, after a first one that counts.
        prior_events: how many average events an item's and a user's mean begin with.
        least_events: items of fewer training targets have no vector.
        seed: of the iteration's start.
    """

    dim: int = 16
    passes: int = 5
    prior_events: float = 5.0
    least_events: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least(self, 2, "dim")
        check_at_least(self, 1, "passes", "least_events")
        check_at_least(self, 0, "prior_events", "seed")


@dataclass(frozen=True)
class CollaborativeVectors:
    """Vectors of the items that have one.

    Args:
        values_ND: float32 [num_items, dim], narrower where items are fewer than that; zeros where there is none.
        present_N: bool [num_items].
    """

    values_ND: np.ndarray
    present_N: np.ndarray


def collaborative_vectors(
    prepared: Prepared, config: CollaborativeConfig, *, rank: int = 0, world_size: int = 1
) -> CollaborativeVectors:
    """Vectors of what users do with items in the training sequences; the same on every process, up to rounding.

    Memory is two numbers times ``dim`` per item, and a row group of sequences.

    Args:
        prepared: sequences; of their training split only the targets that have the label count, each once.
        config: width, passes, priors.
        rank, world_size: this process, which reads its share of the row groups.

    Raises:
        DataError: if no item has enough training targets, or their labels tell no item from another.
    """
    targets = _Targets(prepared, rank, world_size)
    count_N, mean_N, average = targets.means(config.prior_events)
    present_N = count_N >= config.least_events
    if not present_N.any():
        raise DataError(
            f"{prepared.path('train')}: no item has {config.least_events} training targets; lower least_events, "
            "or do without (pipeline: --collaborative false)"
        )
    # columns of like weight: a popular item's many residuals are known better, but are no more than one item
    weight_N = torch.where(present_N, (count_N + 4 * config.prior_events).rsqrt(), 0.0)
    generator = torch.Generator().manual_seed(config.seed)
    basis_NK = torch.randn(prepared.num_items, config.dim - 1 + _SPARE, generator=generator, dtype=torch.float64)
    for _ in range(config.passes):
        basis_NK, _ = torch.linalg.qr(basis_NK * present_N.unsqueeze(1))
        image_NK = torch.zeros_like(basis_NK)
        for row_P, item_P, residual_P in targets.residuals(mean_N, config.prior_events):
            value_P1 = (residual_P * weight_N[item_P]).unsqueeze(1)
            sums_RK = torch.zeros(int(row_P[-1]) + 1, basis_NK.shape[1], dtype=torch.float64)
            sums_RK.index_add_(0, row_P, value_P1 * basis_NK[item_P])
            image_NK.index_add_(0, item_P, value_P1 * sums_RK[row_P])
        sum_over_processes(image_NK)
        basis_NK, previous_NK = image_NK, basis_NK
    # Rayleigh-Ritz: eigenvectors of the items' Gram matrix within the last basis; vectors are V S
    energy_K, rotation_KK = torch.linalg.eigh(previous_NK.T @ image_NK)
    energy_K, rotation_KK = energy_K.flip(0)[: config.dim - 1], rotation_KK.flip(1)[:, : config.dim - 1]
    factors_NK = (previous_NK @ rotation_KK) * energy_K.clamp_min(0).sqrt()
    deviation_N1 = (mean_N - average).unsqueeze(1)
    parts = [_of_variance_1(part_NK, present_N) for part_NK in (deviation_N1, factors_NK)]
    if not any(part_NK.any() for part_NK in parts):
        raise DataError(
            f"{prepared.path('train')}: the labels of the training targets tell no item from another; do without "
            "(pipeline: --collaborative false)"
        )
    values_ND = torch.cat(parts, dim=1) * present_N.unsqueeze(1)
    return CollaborativeVectors(values_ND.float().numpy(), present_N.numpy())


def _of_variance_1(x_NK: Tensor, present_N: Tensor) -> Tensor:
    """Scaled so that the variances of the columns over items that are present sum to 1; zeros if those are alike."""
    variance = x_NK[present_N].var(0, correction=0).sum()
    return x_NK * torch.where(variance > _NOISE, variance, torch.inf).rsqrt()


class _Targets:
    """The training targets, a row group at a time."""

    def __init__(self, prepared: Prepared, rank: int, world_size: int) -> None:
        self._path = prepared.path("train")
        self._num_items = prepared.num_items
        self._rank, self._world_size = rank, world_size

    def means(self, prior: float) -> tuple[Tensor, Tensor, float]:
        """Targets of each item and their mean label, float64 [num_items]; and the average label of all."""
        count_N, sum_N = (torch.zeros(self._num_items, dtype=torch.float64) for _ in range(2))
        for _, item_P, label_P in self._blocks():
            count_N.index_add_(0, item_P, torch.ones_like(label_P))
            sum_N.index_add_(0, item_P, label_P)
        sum_over_processes(count_N, sum_N)
        average = float(sum_N.sum() / count_N.sum().clamp_min(1))
        return count_N, (sum_N + prior * average) / (count_N + prior).clamp_min(1e-9), average

    def residuals(self, mean_N: Tensor, prior: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Of each target: its row, ascending from 0, its item, both int64 [P], and its residual, float64 [P]."""
        for row_P, item_P, label_P in self._blocks():
            residual_P = label_P - mean_N[item_P]
            sum_R, count_R = (torch.zeros(int(row_P[-1]) + 1, dtype=torch.float64) for _ in range(2))
            sum_R.index_add_(0, row_P, residual_P)
            count_R.index_add_(0, row_P, torch.ones_like(residual_P))
            yield row_P, item_P, residual_P - (sum_R / (count_R + prior).clamp_min(1))[row_P]

    def _blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        with open_sequences(self._path, (self._rank, self._world_size)) as files:
            for group in range(self._rank, files.num_groups, self._world_size):
                table = files.table(group, ["item", "action", "num_targets"]).combine_chunks()
                targets_R = table["num_targets"].to_numpy()
                ends_R = table["item"].chunk(0).offsets.to_numpy()[1:]
                row_P = np.repeat(np.arange(len(targets_R)), targets_R)
                # the last of each row's events: places end - targets .. end - 1
                place_P = np.arange(len(row_P)) + np.repeat(ends_R - np.cumsum(targets_R), targets_R)
                item_P, action_P = (table[name].chunk(0).values.to_numpy()[place_P] for name in ("item", "action"))
                label_P = label_of(action_P, 0)
                counts_P = (label_P != UNKNOWN) & (item_P >= 0)
                columns = [torch.from_numpy(values_P[counts_P]) for values_P in (row_P, item_P, label_P)]
                if len(columns[0]):
                    yield columns[0], columns[1].long(), columns[2].double()
