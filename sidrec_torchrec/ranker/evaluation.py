"""How good a ranker is on a split."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.processes import is_first_process, sum_over_processes
from sidrec_torchrec.ranker.bootstrap import UserBootstrap
from sidrec_torchrec.ranker.breakdown import Breakdown, Past, TargetFacts
from sidrec_torchrec.ranker.metrics import SLICES, RankingMetrics
from sidrec_torchrec.ranker.model import RankerOutput
from sidrec_torchrec.ranker.reliability import Reliability
from sidrec_torchrec.ranker.target_sums import TargetSums
from sidrec_torchrec.training.group import Processes
from sidrec_torchrec.training.progress import Stage, say
from sidrec_torchrec.training.trainee import NotFiniteError, Values

BREAKDOWN = "breakdown"  # the tables, among the metrics
RELIABILITY = "reliability"  # the calibration curves' counts
BOOTSTRAP = "bootstrap"  # intervals over users


def evaluate(model: nn.Module, data: SequenceBatches, processes: Processes, progress: Stage) -> Values:
    """Metrics of the model on a split of the sequences it is trained on; see ``RankingMetrics.compute``.

    Raises:
        NotFiniteError: on every process, if predictions are not finite.
    """
    return _evaluate(model, data, processes, progress, Past.of(data.prepared))


def evaluate_in_detail(
    model: nn.Module, data: SequenceBatches, processes: Processes, progress: Stage
) -> dict[str, Any]:
    """As ``evaluate``, NE by bucket as ``breakdown``, by what is predicted how often it came true as ``reliability``, and what
    other users would have made of NE as ``bootstrap``.

    See ``Breakdown.compute``, ``Reliability.compute`` and ``UserBootstrap.compute``.

    Args:
        model: the ranker.
        data: batches of the split. Sequences that the ranker was not trained on must say what its own training had; see
            ``data.seen_by``.
        processes: the group.
        progress: advances by targets.
    """
    past = Past.of(data.prepared)
    targets = TargetSums(processes.device, data.prepared.tasks, data.prepared.regressions)
    breakdown = Breakdown(past, targets, processes.device)
    reliability = Reliability(processes.device, data.prepared.tasks)
    bootstrap = UserBootstrap(targets, processes.device)

    def take(output: RankerOutput, facts: TargetFacts) -> None:
        breakdown.update(output, facts)
        reliability.update(output)
        bootstrap.update(output, facts.user_S, past.seen_I[facts.item_S])

    values = _evaluate(model, data, processes, progress, past, take)
    tables = {BREAKDOWN: breakdown.compute(), RELIABILITY: reliability.compute(), BOOTSTRAP: bootstrap.compute()}
    return {**values, **tables}


@torch.no_grad()
def _evaluate(
    model: nn.Module,
    data: SequenceBatches,
    processes: Processes,
    progress: Stage,
    past: Past,
    take: Callable[[RankerOutput, TargetFacts], None] | None = None,
) -> Values:
    model.eval()
    prepared = data.prepared
    metrics = RankingMetrics(
        processes.rank, processes.world_size, processes.device, prepared.tasks, prepared.regressions
    )
    num_bad = torch.zeros((), dtype=torch.int64, device=processes.device)
    for batch in data:
        facts = TargetFacts.of(batch)
        _, output = model(batch.to(processes.device))
        metrics.update(output, torch.from_numpy(past.seen_I[facts.item_S]).to(processes.device))
        if take is not None:
            take(output, facts)
        num_bad += (~output.prediction.isfinite()).sum()
        progress.advance(int(batch.global_targets))
    sum_over_processes(num_bad)
    if num_bad:
        raise NotFiniteError(f"{data.split}: {int(num_bad)} predictions are not finite; the weights are spoilt")
    values = metrics.compute()
    # few validation targets are cold; of them only the sum is worth a look
    shown = ("warm", "cold") if data.split == "test" else ("all",)
    kinds = ["ne"] * bool(prepared.tasks) + ["nmse"] * bool(prepared.regressions)
    said = (f"{kind.upper()} {part} {_short(values[f'{kind}_{part}'])}" for kind in kinds for part in shown)
    progress.advance(0, ", ".join(said))
    return values


def check_defined(values: Mapping[str, Any], prepared: Prepared, split: str) -> None:
    """Says which NE of a split is null, and why; call on every process, when the values are kept.

    Raises:
        SidrecError: if none of all targets together is defined, so that the values say nothing of the ranker.
    """
    tasks = prepared.predicted
    names = {part: [part] if len(tasks) == 1 else [f"{part}_{task}" for task in tasks] for part in SLICES}
    kinds = ["ne"] * len(prepared.tasks) + ["nmse"] * len(prepared.regressions)
    reasons = {}
    for part in SLICES:
        for kind, name in zip(kinds, names[part], strict=True):
            if values[f"{kind}_{name}"] is None:
                count = int(values[f"targets_{name}"] or 0)
                reasons[name] = f"all {count} have one label" if count else "there are none"
    if reasons.keys() >= set(names["all"]):
        why = "; ".join(f"'{name}': {reasons[name]}" for name in names["all"])
        raise SidrecError(
            f"{prepared.path(split)}: its targets tell nothing of a ranker ({why}): NE, AUC and calibration are "
            "null; prepare more events, or another label"
        )
    if is_first_process() and reasons:
        say("; ".join(f"NE of the {split} targets '{name}' is null: {why}" for name, why in reasons.items()))


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
