"""How good a ranker is on a split."""

from typing import Any

import torch
from torch import nn

from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.prepare import Prepared
from sidrec_torchrec.ranker.breakdown import Breakdown, Past, TargetFacts
from sidrec_torchrec.ranker.metrics import RankingMetrics
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.loop import Values
from sidrec_torchrec.training.progress import Stage

BREAKDOWN = "breakdown"  # the tables, among the metrics


def evaluate(model: nn.Module, data: SequenceBatches, processes: Processes, progress: Stage) -> Values:
    """Metrics of the model on a split of the sequences it is trained on; see ``RankingMetrics.compute``."""
    return _evaluate(model, data, processes, progress, Past.of(data.prepared), None)


def evaluate_in_detail(
    model: nn.Module, data: SequenceBatches, processes: Processes, progress: Stage, trained_on: Prepared
) -> dict[str, Any]:
    """As ``evaluate``, and NE by bucket as ``breakdown``; see ``Breakdown.compute``.

    Args:
        model: the ranker.
        data: batches of the split.
        processes: the group.
        progress: advances by targets.
        trained_on: the sequences the ranker was trained on, whatever it is tested on: they say what is warm.
    """
    past = Past.of(data.prepared, trained_on)
    breakdown = Breakdown(past, processes.device, data.prepared.tasks)
    values = _evaluate(model, data, processes, progress, past, breakdown)
    return {**values, BREAKDOWN: breakdown.compute()}


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    data: SequenceBatches,
    processes: Processes,
    progress: Stage,
    past: Past,
    breakdown: Breakdown | None,
) -> Values:
    model.eval()
    metrics = RankingMetrics(processes.rank, processes.world_size, processes.device, data.prepared.tasks)
    for batch in data:
        facts = TargetFacts.of(batch)
        _, output = model(batch.to(processes.device))
        metrics.update(output, torch.from_numpy(past.seen_I[facts.item_S]).to(processes.device))
        if breakdown is not None:
            breakdown.update(output, facts)
        progress.advance(int(batch.global_targets))
    values = metrics.compute()
    # few validation targets are cold; of them only the sum is worth a look
    shown = ("warm", "cold") if data.split == "test" else ("all",)
    progress.advance(0, ", ".join(f"NE {part} {_short(values[f'ne_{part}'])}" for part in shown))
    return values


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
