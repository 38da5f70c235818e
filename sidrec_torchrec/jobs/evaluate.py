"""Evaluates a trained ranker on a split."""

import json
from dataclasses import dataclass
from pathlib import Path

from sidrec_torchrec.data.prepare import SPLITS, open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import write_json
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.training import check_defined, evaluate
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import stage


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


def main(config: EvaluateConfig) -> dict[str, float | None]:
    """Prints, writes and returns NE, AUC and calibration over all, warm and cold targets; see ``RankingMetrics.compute``.

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
        total = parts.prepared.counts[config.split]["targets"]
        with stage(f"{trained.recipe.arm} {config.split}", total, show=processes.is_main) as progress:
            values = evaluate(model, parts.batches(config.split, processes), processes, progress)
        if processes.is_main:
            print(json.dumps(values, indent=2))
            if config.out is not None:
                write_json(config.out, values)
        check_defined(values, parts.prepared, config.split)
        return values


def _check_tasks(trained: TrainedRanker, prepared: Path) -> None:
    own, given = open_prepared(trained.recipe.prepared).tasks, open_prepared(prepared).tasks
    if own != given:
        raise SidrecError(
            f"{prepared}: of the tasks {', '.join(given)}; the ranker predicts {', '.join(own)}: "
            "prepare with the same --protocol.tasks"
        )
