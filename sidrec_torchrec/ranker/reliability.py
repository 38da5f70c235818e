"""How often what a ranker predicts comes true, by what it predicts: counts of which a calibration curve is drawn."""

from typing import Any

import torch
import torch.distributed as dist

from sidrec_torchrec.ranker.model import RankerOutput

# The same for every log and arm, so that curves compare; closer together at the ends, where clicks and purchases are.
EDGES = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
    *(0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999),
)
_SUMS = 3  # per bin and task: targets, positives, predictions


class Reliability:
    """Accumulates predictions by bins of their own value: three sums for each, whatever the number of targets.

    Args:
        device: where predictions are.
        tasks: names of the predictions' first columns, which are probabilities.
    """

    def __init__(self, device: torch.device, tasks: tuple[str, ...]) -> None:
        self._tasks = tasks
        self._edges = torch.tensor(EDGES, dtype=torch.float64, device=device)
        self._sums_KB3 = torch.zeros(len(tasks), len(EDGES) + 1, _SUMS, dtype=torch.float64, device=device)

    def update(self, output: RankerOutput) -> None:
        """Takes one batch's predictions."""
        for k, sums_B3 in enumerate(self._sums_KB3):
            weight_S, label_S, p_S = (x[:, k].double() for x in (output.weight, output.label, output.prediction))
            sums_S3 = torch.stack([weight_S, weight_S * label_S, weight_S * p_S], dim=1)
            sums_B3.index_add_(0, torch.bucketize(p_S.contiguous(), self._edges, right=True), sums_S3)

    def compute(self) -> dict[str, list[dict[str, Any]]]:
        """By task, a row for each bin; the same on every process.

        A row has ``from`` and ``to``, between which the predictions lie (from <= p < to), ``targets``, ``positives``, and
        ``prediction``, their mean; None where there are no targets.
        """
        sums_KB3 = self._sums_KB3.clone()
        if dist.is_initialized():
            dist.all_reduce(sums_KB3)
        bounds = [*zip((0.0, *EDGES), (*EDGES, 1.0), strict=True)]
        return {
            task: [
                {
                    "from": low,
                    "to": high,
                    "targets": round(targets),
                    "positives": round(positives),
                    "prediction": predicted / targets if targets else None,
                }
                for (low, high), (targets, positives, predicted) in zip(bounds, sums_B3, strict=True)
            ]
            for task, sums_B3 in zip(self._tasks, sums_KB3.tolist(), strict=True)
        }
