"""How well numbers are predicted: squared errors over all, warm and cold targets, and their share of what the training mean leaves."""

import math

import torch
from torch import Tensor
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.mse import MSEMetric

from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.scales import on_scale


class RegressionMetrics:
    """Accumulates predictions of regressions; a slice of one is to torchrec a task whose weights are zero outside it.

    Args:
        rank: this process.
        world_size: number of processes.
        device: where predictions are.
        regressions: R of them, the last columns of predictions.
        slices: by name, which part of the targets, and which regression.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        regressions: tuple[Regression, ...],
        slices: dict[str, tuple[str, int]],
    ) -> None:
        self._slices = slices
        self._mean_R = torch.tensor([own.mean for own in regressions], dtype=torch.float64, device=device)
        self._is_log_R = torch.tensor([own.is_log for own in regressions], device=device)
        infos = [RecTaskInfo(name=name) for name in slices]
        self._mse = MSEMetric(world_size=world_size, my_rank=rank, batch_size=1, tasks=infos).to(device)
        # what they weigh, and squared errors of the training mean
        self._sums = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in slices}

    def update(self, output: RankerOutput, inside: dict[str, Tensor | int]) -> None:
        """Takes one batch's predictions, and which targets are in each part, bool [S]."""
        first = output.prediction.shape[1] - len(self._mean_R)
        label_SR, prediction_SR = (
            on_scale(x[:, first:].double(), self._is_log_R) for x in (output.label, output.prediction)
        )
        left_SR = (label_SR - self._mean_R).square()
        weights = {n: (output.weight[:, first + r] * inside[part]).double() for n, (part, r) in self._slices.items()}
        self._mse.update(
            predictions={name: prediction_SR[:, r] for name, (_, r) in self._slices.items()},
            labels={name: label_SR[:, r] for name, (_, r) in self._slices.items()},
            weights=weights,
        )
        for name, (_, r) in self._slices.items():
            self._sums[name] += torch.stack([weights[name].sum(), (weights[name] * left_SR[:, r]).sum()])

    def compute(self) -> dict[str, float]:
        """By name ``mse_``, ``nmse_`` and ``targets_``; torchrec's, of which rank 0 alone has all, and NaN where not defined."""
        values = {}
        computed = self._mse.compute()
        for name, sums in self._sums.items():
            sums = sums.clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            weight, left = sums.tolist()
            mse = computed.get(f"mse-{name}|lifetime_mse")
            values[f"mse_{name}"] = float(mse) if mse is not None and weight else math.nan
            values[f"nmse_{name}"] = values[f"mse_{name}"] * weight / left if left else math.nan
            values[f"targets_{name}"] = weight
        return values
