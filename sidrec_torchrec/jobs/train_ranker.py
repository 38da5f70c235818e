"""Trains the ranker with one arm, keeps the best epoch and tests it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.ranker.bytes import bytes_per_event, table_bytes
from sidrec_torchrec.ranker.evaluation import check_defined, evaluate_in_detail
from sidrec_torchrec.ranker.recipe import RankerRecipe
from sidrec_torchrec.ranker.trained_on import keep_trained_on
from sidrec_torchrec.ranker.training import RankerTraining
from sidrec_torchrec.ranker.warm_start import start_from, weight_files
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.loop import Loop
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run
from sidrec_torchrec.training.trackers import Trackers, open_trackers


@dataclass(frozen=True, kw_only=True)
class TrainRankerConfig(RankerRecipe):
    """What to train, and where to.

    Args:
        out: folder for checkpoints, curves and ``metrics.json``.
        init: folder of a trained ranker of the same arm, sizes, tasks, codec and values of user features, whose weights to start
            from; none given: random ones.
    """

    out: Path
    init: Path | None = None

    def files(self) -> list[Path]:
        """The files the run depends on."""
        return super().files() + ([] if self.init is None else weight_files(self.init))


def main(config: TrainRankerConfig) -> dict[str, Any]:
    """Trains; a finished run is read back, an interrupted one goes on from its last checkpoint.

    Returns:
        The content of ``metrics.json``: test metrics, bytes, speed, the course of validation.

    Raises:
        DivergedError: if training comes to what is not finite.
        PreemptedError: after SIGTERM or SIGHUP, once a checkpoint is made.
        SidrecError: after ``metrics.json`` is written, if the test labels are all the same, so that no metric is defined.
        RunMismatchError: if ``out`` holds a run of another configuration, or of inputs that have changed.
    """
    with process_group() as processes, open_run(config.out, config, inputs=config.files()) as run:
        result = run.result
        if result is None:
            with open_trackers(config.tracker, config.out, processes) as trackers:
                result = run.finish(_train_and_test(config, processes, trackers))
        check_defined(result["test"], open_prepared(config.prepared), "test")
        return result


def _train_and_test(config: TrainRankerConfig, processes: Processes, trackers: Trackers) -> dict[str, Any]:
    parts = config.open()
    model = parts.sharded(processes)
    if config.init is not None:
        start_from(config.init, model, config)
    keep_trained_on(config.out, parts.prepared, parts.inputs, config.arm)
    training = RankerTraining(config.arm, config, model, parts.prepared, parts.arm, processes)
    course = Loop(training, config.loop(), config.out, processes, trackers).run()
    counts = parts.prepared.counts
    with stage(f"{config.arm} test", counts["test"]["targets"], show=processes.is_main) as progress:
        test = evaluate_in_detail(model, parts.batches("test", processes), processes, progress)
    return {
        "arm": config.arm,
        "seed": config.seed,
        "tasks": list(parts.prepared.predicted),
        "test": test,
        **bytes_per_event(parts.arm, parts.prepared),
        "table_bytes": table_bytes(model),
        "train_events_per_s": counts["train"]["events"] * len(course.epochs) / course.seconds,
        **training.result(course),
    }
