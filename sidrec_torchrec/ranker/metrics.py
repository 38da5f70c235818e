"""NE, AUC and calibration over all, warm and cold targets, by torchrec.metrics."""

import math

import torch
from torchrec.metrics.auc import AUCMetric
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.ne import NEMetric

from sidrec_torchrec.ranker.model import RankerOutput

SLICES = ("all", "warm", "cold")
_AUC_TARGETS = 10_000_000  # AUC is over the last this many targets of a process; NE and calibration over all


class RankingMetrics:
    """Accumulates predictions; a slice is a task whose weights are zero outside it.

    Args:
        rank: this process.
        world_size: number of processes.
        device: where predictions are.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        tasks = [RecTaskInfo(name=name) for name in SLICES]
        common = {"world_size": world_size, "my_rank": rank, "batch_size": 1, "tasks": tasks}
        self._metrics = {
            "ne": NEMetric(**common).to(device),
            "auc": AUCMetric(**common, window_size=_AUC_TARGETS * world_size).to(device),
            "calibration": CalibrationMetric(**common).to(device),
        }
        self._counts = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in SLICES}

    def update(self, output: RankerOutput) -> None:
        """Takes one batch's predictions."""
        weights = {
            "all": output.weight,
            "warm": output.weight * output.seen,
            "cold": output.weight * ~output.seen,
        }
        for metric in self._metrics.values():
            metric.update(
                predictions=dict.fromkeys(SLICES, output.prediction.double()),
                labels=dict.fromkeys(SLICES, output.label.double()),
                weights=weights,
            )
        for name in SLICES:
            weight, label = weights[name].double(), output.label.double()
            self._counts[name] += torch.stack([weight.sum(), (weight * label).sum()])  # targets, positives

    def compute(self) -> dict[str, float | None]:
        """``ne_warm``, ``auc_cold``, ``calibration_all``, ``targets_all``, ...; the same on every process.

        A value is None where the slice is empty or of one class only, so that it is not defined. Calibration is the
        sum of predictions over the number of positives: 1 is right.
        """
        values: dict[str, float] = {}
        for kind, metric in self._metrics.items():
            computed = metric.compute()
            window = "window_auc" if kind == "auc" else f"lifetime_{kind}"
            for name in SLICES:
                value = computed.get(f"{kind}-{name}|{window}")
                values[f"{kind}_{name}"] = float(value) if value is not None else math.nan
        for name in SLICES:
            counts = self._counts[name].clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            targets, positives = counts.tolist()
            values[f"targets_{name}"] = targets
            if positives in (0, targets):  # empty or of one class: torchrec's AUC says 0.5 there, its NE anything
                values |= dict.fromkeys((f"ne_{name}", f"auc_{name}", f"calibration_{name}"), math.nan)
        shared = [values]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(shared)  # rank 0 alone gets torchrec's values
        return {name: value if math.isfinite(value) else None for name, value in shared[0].items()}
