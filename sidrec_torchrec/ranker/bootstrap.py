"""How far NE would move had other users been tested: a bootstrap over users, whose resamplings are the same for every ranker.

A user's events are alike, so users are drawn, not events. How often a resampling has a user is a Poisson number of mean 1 (Hanley &
MacGibbon 2006; Chamandy et al. 2012), which the user's id alone decides: nothing of a user need be kept, any number of processes
comes to the same, and two rankers that are tested on the same users meet the same resamplings, so that their difference is paired.
"""

import math
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sidrec_torchrec.data.ids import split_mix
from sidrec_torchrec.processes import sum_over_processes
from sidrec_torchrec.ranker.metrics import SLICES
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.target_sums import NUM_SUMS, TargetSums

RESAMPLINGS = 500
_LEVEL = 0.95
_BLOCK_USERS = 1_024  # whose draws are held at a time
_DIGITS = 7  # of a replicate that is kept
# the chance of at most 0, 1, 2, ... draws; of more than 17 it is below 10^-16
_AT_MOST = np.array(list(accumulate(math.exp(-1) / math.factorial(k) for k in range(18))))


def times_drawn(user_U: np.ndarray, resamplings: int) -> np.ndarray:
    """How often each resampling has each user, int64 [U, resamplings]: Poisson of mean 1, decided by the user's number, int64 [U]."""
    uniform_UB = (split_mix(user_U, resamplings) >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(_AT_MOST, uniform_UB, side="right")


class UserBootstrap:
    """Accumulates what NE is made of under each resampling; memory depends on neither targets nor users.

    Args:
        targets: what is summed of each target.
        device: where predictions are.
        resamplings: B, how many.
    """

    def __init__(self, targets: TargetSums, device: torch.device, resamplings: int = RESAMPLINGS) -> None:
        self._targets = targets
        shape = (resamplings, 2, len(targets.tasks), NUM_SUMS)  # 2: warm, cold
        self._sums_B2K5 = torch.zeros(shape, dtype=torch.float64, device=device)

    def update(self, output: RankerOutput, user_S: np.ndarray, seen_S: np.ndarray) -> None:
        """Takes one batch's predictions.

        Args:
            output: of S targets.
            user_S: int64, the number of each target's user; see ``data.ids.seed_of``.
            seen_S: bool, whether each target's item occurs in training.
        """
        sums_SK5 = self._targets.of(output)
        user_U, place_S = np.unique(user_S, return_inverse=True)
        slice_S = torch.from_numpy(2 * place_S + ~seen_S).to(sums_SK5.device)
        sums_U2K5 = sums_SK5.new_zeros(2 * len(user_U), *sums_SK5.shape[1:]).index_add_(0, slice_S, sums_SK5)
        sums_U2K5 = sums_U2K5.unflatten(0, (-1, 2))
        for first in range(0, len(user_U), _BLOCK_USERS):
            block = slice(first, first + _BLOCK_USERS)
            times_UB = torch.from_numpy(times_drawn(user_U[block], len(self._sums_B2K5))).to(sums_SK5)
            self._sums_B2K5 += torch.einsum("ub,u...->b...", times_UB, sums_U2K5[block])

    def compute(self) -> dict[str, dict[str, Any]]:
        """By metric, ``ne_warm``, say, or ``nmse_all_dwell``, its ``interval`` and ``replicates``; the same on every process.

        Names and means over tasks are those of ``RankingMetrics.compute``. The replicates are the metric under each resampling, None
        where it is not defined; the interval, which holds 95% of them, is None if one is not: there are too few users.
        """
        sums_B2K5 = self._sums_B2K5.clone()
        sum_over_processes(sums_B2K5)
        sums = dict(zip(SLICES, (sums_B2K5.sum(1), *sums_B2K5.unbind(1)), strict=True))
        values: dict[str, Tensor] = {}
        for kind, tasks in self._kinds():
            for part in SLICES:
                own = {name: self._targets.ratio(sums[part][:, k], k) for name, k in tasks.items()}
                if len(self._targets.tasks) > 1:
                    values |= {f"{kind}_{part}_{name}": value_B for name, value_B in own.items()}
                values[f"{kind}_{part}"] = torch.stack([*own.values()]).mean(0)
        return {name: _kept(value_B.cpu().numpy()) for name, value_B in values.items()}

    def _kinds(self) -> list[tuple[str, dict[str, int]]]:
        places = {name: k for k, name in enumerate(self._targets.tasks)}
        labels = {name: k for name, k in places.items() if name in self._targets.labels}
        kinds = [("ne", labels), ("nmse", {name: k for name, k in places.items() if name not in labels})]
        return [(kind, tasks) for kind, tasks in kinds if tasks]


def interval(value_B: np.ndarray) -> list[float] | None:
    """The middle 95% of a metric's resamplings, float [B]; None if it is not defined (NaN) in one of them."""
    if np.isnan(value_B).any():
        return None
    return np.quantile(value_B, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]).tolist()


def _kept(value_B: np.ndarray) -> dict[str, Any]:
    replicates = [None if math.isnan(value) else float(f"{value:.{_DIGITS}g}") for value in value_B.tolist()]
    return {"interval": interval(value_B), "replicates": replicates}
