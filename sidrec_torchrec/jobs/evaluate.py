"""Evaluates a trained ranker on a split."""

import json
from dataclasses import dataclass
from pathlib import Path

from sidrec_torchrec.data.prepare import SPLITS, open_prepared
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import write_json
from sidrec_torchrec.jobs.train_ranker import batches, build_ranker, evaluate, load_arm, open_trained
from sidrec_torchrec.training.checkpoints import BEST
from sidrec_torchrec.training.group import process_group


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which ranker to evaluate, on what.

    Args:
        ranker: folder train-ranker wrote.
        split: ``test``, ``validation`` or ``train``.
        prepared: sequences to evaluate on, if not those it was trained on.
        out: JSON file for the metrics; none given: they are only printed.
    """

    ranker: Path
    split: str = "test"
    prepared: Path | None = None
    out: Path | None = None


def main(config: EvaluateConfig) -> dict[str, float | None]:
    """Prints, writes and returns NE, AUC and calibration over all, warm and cold targets; see ``RankingMetrics.compute``.

    Raises:
        SidrecError: on an unknown split, a folder without a trained ranker, or sequences of other tasks than its own.
    """
    if config.split not in SPLITS:
        raise SidrecError(f"unknown split '{config.split}'; there are {', '.join(SPLITS)}")
    with process_group() as processes:
        trained, checkpoints = open_trained(config.ranker)
        prepared = open_prepared(config.prepared or trained.prepared)
        if config.prepared and (own := open_prepared(trained.prepared).tasks) != prepared.tasks:
            raise SidrecError(
                f"{config.prepared}: of the tasks {', '.join(prepared.tasks)}; the ranker predicts {', '.join(own)}: "
                "prepare with the same --protocol.tasks"
            )
        arm = load_arm(trained, prepared)
        model = build_ranker(trained, prepared, arm, processes)
        checkpoints.load(BEST, {"model": model.state_dict()})
        data = batches(trained, prepared, arm, config.split, processes)
        values = evaluate(model, data, processes, f"{trained.arm} {config.split}")
        if processes.is_main:
            print(json.dumps(values, indent=2))
            if config.out is not None:
                write_json(config.out, values)
        return values
