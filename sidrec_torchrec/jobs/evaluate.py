"""Evaluates a trained ranker on a split."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.prepare import SPLITS, open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import write_json
from sidrec_torchrec.ranker.breakdown import have_same_items
from sidrec_torchrec.ranker.evaluation import check_defined, evaluate_in_detail
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import say, stage


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    """Which ranker to evaluate, on what.

    Args:
        ranker: folder train-ranker wrote.
        split: ``test``, ``validation`` or ``train``.
        prepared: folder of sequences to evaluate on, if not those it was trained on.
        out: JSON file for the metrics; none given: they are only printed.
    """

    ranker: Path
    split: str = "test"
    prepared: Path | None = None
    out: Path | None = None


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Prints, writes and returns NE, AUC and calibration over all, warm and cold targets; see ``RankingMetrics.compute``.

    And NE by popularity and age of the item, length of the history and age of the model; see ``Breakdown.compute``. What is
    warm and popular, and how old the model is, is said by the sequences it was trained on.

    Raises:
        SidrecError: on an unknown split, a folder without a trained ranker, or sequences of other tasks than its own;
            after all is written, if the split's labels are all the same, so that nothing is defined.
        CodecMismatchError: if the folders of SIDs it reads have been encoded anew, by another codec.
    """
    if config.split not in SPLITS:
        raise SidrecError(f"unknown split '{config.split}'; there are {', '.join(SPLITS)}")
    with process_group() as processes:
        trained = TrainedRanker.open(config.ranker)
        if config.prepared:
            _check_tasks(trained, config.prepared)
        parts = trained.recipe.open(config.prepared)
        model = parts.sharded(processes)
        trained.load(model)
        own = open_prepared(trained.recipe.prepared)
        if processes.is_main and not have_same_items(parts.prepared, own):
            say(
                f"{parts.prepared.folder}: of other items than the ranker was trained on: warm are those that its training part "
                "has, and how often the ranker was trained on an item is not known"
            )
        total = parts.prepared.counts[config.split]["targets"]
        with stage(f"{trained.recipe.arm} {config.split}", total, show=processes.is_main) as progress:
            data = parts.batches(config.split, processes)
            values = evaluate_in_detail(model, data, processes, progress, own)
        if processes.is_main:
            print(_json(values))
            if config.out is not None:
                write_json(config.out, values)
        check_defined(values, parts.prepared, config.split)
        return values


def _json(values: dict[str, Any]) -> str:
    """JSON, each bucket of a table on one line."""
    return re.sub(r"\{[^{}]*\}", lambda row: " ".join(row[0].split()), json.dumps(values, indent=2))


def _check_tasks(trained: TrainedRanker, prepared: Path) -> None:
    own, given = open_prepared(trained.recipe.prepared).tasks, open_prepared(prepared).tasks
    if own != given:
        raise SidrecError(
            f"{prepared}: of the tasks {', '.join(given)}; the ranker predicts {', '.join(own)}: "
            "prepare with the same --protocol.tasks"
        )
