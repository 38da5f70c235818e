"""NE, AUC and calibration of each task, and squared errors of each regression, over all, warm and cold targets, by torchrec.metrics."""

import math
from statistics import fmean

import torch
from torch import Tensor
from torchrec.metrics.auc import AUCMetric
from torchrec.metrics.calibration import CalibrationMetric
from torchrec.metrics.metrics_config import RecTaskInfo
from torchrec.metrics.ne import NEMetric
from torchrec.metrics.rec_metric import RecMetric

from sidrec_torchrec.data.regression import Regression
from sidrec_torchrec.data.tasks import DEFAULT_TASKS
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.regression_metrics import RegressionMetrics

SLICES = ("all", "warm", "cold")
_AUC_TARGETS = 10_000_000  # AUC is over the last this many targets of a process; NE and calibration over all


class RankingMetrics:
    """Accumulates predictions; a slice of a task is to torchrec a task whose weights are zero outside it.

    Args:
        rank: this process.
        world_size: number of processes.
        device: where predictions are.
        tasks: names of the predictions' columns that are probabilities.
        regressions: of the others, which come last.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        tasks: tuple[str, ...] = DEFAULT_TASKS,
        regressions: tuple[Regression, ...] = (),
    ) -> None:
        self._tasks = tasks
        names = (*tasks, *(own.name for own in regressions))
        self._suffixes = [f"_{name}" if len(names) > 1 else "" for name in names]
        slices = {  # by name: which part of the targets, which column
            f"{part}{suffix}": (part, k) for k, suffix in enumerate(self._suffixes) for part in SLICES
        }
        self._slices = {name: (part, k) for name, (part, k) in slices.items() if k < len(tasks)}
        of_values = {name: (part, k - len(tasks)) for name, (part, k) in slices.items() if k >= len(tasks)}
        self._values = None
        if regressions:
            self._values = RegressionMetrics(rank, world_size, device, regressions, of_values)
        infos = [RecTaskInfo(name=name) for name in self._slices]
        common = {"world_size": world_size, "my_rank": rank, "batch_size": 1, "tasks": infos}
        self._metrics: dict[str, RecMetric] = {}
        if tasks:
            self._metrics = {
                "ne": NEMetric(**common).to(device),
                "auc": AUCMetric(**common, window_size=_AUC_TARGETS * world_size).to(device),
                "calibration": CalibrationMetric(**common).to(device),
            }
        self._counts = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in self._slices}

    def update(self, output: RankerOutput, seen_S: Tensor) -> None:
        """Takes one batch's predictions, and whether each target's item occurs in training, bool [S]."""
        inside: dict[str, Tensor | int] = {"all": 1, "warm": seen_S, "cold": ~seen_S}
        if self._values is not None:
            self._values.update(output, inside)
        weights = {name: output.weight[:, k] * inside[part] for name, (part, k) in self._slices.items()}
        labels = {name: output.label[:, k].double() for name, (_, k) in self._slices.items()}
        predictions = {name: output.prediction[:, k].double() for name, (_, k) in self._slices.items()}
        for metric in self._metrics.values():
            metric.update(predictions=predictions, labels=labels, weights=weights)
        for name, counts in self._counts.items():
            weight = weights[name].double()
            counts += torch.stack([weight.sum(), (weight * labels[name]).sum()])  # targets, positives

    def compute(self) -> dict[str, float | None]:
        """``ne_warm``, ``auc_cold``, ``calibration_all``, ``targets_all``, ...; the same on every process.

        Of several tasks ``ne_warm_like``, ..., where ``targets_`` counts those that have the label; ``ne_`` and ``auc_``
        without a task's name are then the means over the tasks. Of a regression ``mse_``, and ``nmse_``, the share that this is of
        the squared errors of predicting the mean of training: 1 is no better. Both are on the scale on which it is learned.

        A value is None where the slice is empty or of one class only, so that it is not defined. Calibration is the
        sum of predictions over the number of positives: 1 is right.
        """
        values: dict[str, float] = {}
        for kind, metric in self._metrics.items():
            computed = metric.compute()
            window = "window_auc" if kind == "auc" else f"lifetime_{kind}"
            for name in self._counts:
                value = computed.get(f"{kind}-{name}|{window}")
                values[f"{kind}_{name}"] = float(value) if value is not None else math.nan
        for name, counts in self._counts.items():
            counts = counts.clone()
            if torch.distributed.is_initialized():
                torch.distributed.all_reduce(counts)
            targets, positives = counts.tolist()
            values[f"targets_{name}"] = targets
            if positives in (0, targets):  # empty or of one class: torchrec's AUC says 0.5 there, its NE anything
                values |= dict.fromkeys((f"ne_{name}", f"auc_{name}", f"calibration_{name}"), math.nan)
        if self._values is not None:
            values |= self._values.compute()
        if len(self._suffixes) > 1:
            of_labels, of_values = self._suffixes[: len(self._tasks)], self._suffixes[len(self._tasks) :]
            for kind, suffixes in (("ne", of_labels), ("auc", of_labels), ("nmse", of_values)):
                for start in (f"{kind}_{part}" for part in SLICES if suffixes):
                    values[start] = fmean(values[f"{start}{suffix}"] for suffix in suffixes)
        shared = [values]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(shared)  # rank 0 alone gets torchrec's values
        return {name: value if math.isfinite(value) else None for name, value in shared[0].items()}
