"""Evaluates a trained ranker: on a split of its own sequences, on others, or on new days and items that are prepared for it."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.drift import drift, report_drift
from sidrec_torchrec.data.format import DataFolder, DataSchema
from sidrec_torchrec.data.like import backtest_config
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.prepare import prepare
from sidrec_torchrec.data.prepared import SEQUENCES, Prepared, open_prepared
from sidrec_torchrec.data.seen_by import check_labels
from sidrec_torchrec.data.sids import sid_files
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.files import write_json
from sidrec_torchrec.output import show, warn
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.ranker.evaluation import BOOTSTRAP, check_defined, evaluate_in_detail
from sidrec_torchrec.ranker.recipe import RankerParts, TrainedRanker
from sidrec_torchrec.training.checkpoints import BEST
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.loop import CHECKPOINTS
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run, share


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(JobConfig):
    """Which ranker to evaluate, on what.

    Args:
        ranker: folder train-ranker wrote.
        split: ``test``, ``validation`` or ``train``.
        prepared: folder of sequences to evaluate on, if not those it was trained on.
        data: data folder of new days or items: what came after the ranker's training is prepared as its own data were, and
            tested; with ``prepared``, where the items of those sequences are.
        schema: what the files and columns of ``data`` are called, where they are not called as the ranker's were.
        sids: folders of those items' SIDs, by the codecs that the ranker reads; none given: its own folders.
        test_from: with ``data``: when the test begins, a date or a whole number of seconds; none given: after the last event that
            the ranker was trained on.
        policy: with ``data``: what becomes of events that a log should not have, said over the ranker's.
        out: JSON file for the metrics; none given: they are only printed. With ``data`` and no ``prepared`` a folder, for sequences,
            ``metrics.json`` and ``drift.json``.
    """

    ranker: Path
    split: str = "test"
    prepared: Path | None = None
    data: Path | None = None
    schema: DataSchema = field(default_factory=DataSchema)
    sids: tuple[Path, ...] = ()
    test_from: str | None = None
    policy: EventPolicy = field(default_factory=EventPolicy)
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in SPLITS:
            raise SidrecError(f"unknown split '{self.split}'; there are {', '.join(SPLITS)}")
        if self.is_backtest and self.out is None:
            raise ValueError("--data needs --out, a folder for the sequences, the metrics and the drift")
        if self.is_backtest and self.split != "test":
            raise ValueError(f"--data is tested whole: leave --split {self.split} out")
        if not self.is_backtest and (self.test_from is not None or self.policy != EventPolicy()):
            raise ValueError("--test-from and --policy are of --data, which is prepared here; --prepared has been")

    @property
    def is_backtest(self) -> bool:
        """Whether new data are to be prepared."""
        return self.data is not None and self.prepared is None

    def files(self) -> list[Path]:
        """What a backtest depends on: the ranker, the SIDs it reads, and the data."""
        weights = sorted(path for path in (self.ranker / CHECKPOINTS / BEST).rglob("*") if path.is_file())
        sids = self.sids or TrainedRanker.open(self.ranker).recipe.sids
        assert self.data is not None
        return [*weights, *DataFolder.of(self.data, self.schema).files(), *sid_files(sids)]


def main(config: EvaluateConfig) -> dict[str, Any]:
    """Prints, writes and returns NE, AUC and calibration, or squared errors, over all, warm and cold targets; see ``RankingMetrics.compute``.

    And NE by popularity and age of the item, length of the history and age of the model; see ``Breakdown.compute``; and intervals of
    NE by a bootstrap over users, of which the replicates are not printed; see ``UserBootstrap.compute``. What is warm
    and popular is what this ranker was trained on, item by item, by their ids, whatever the sequences were prepared for. Of other sequences than its
    own the metrics also hold ``drift``; see ``data.drift.drift``.

    Raises:
        SidrecError: on an unknown split, a folder without a trained ranker, or sequences of other tasks or codes than its own;
            after all is written, if the split's labels are all the same, so that nothing is defined.
        CodecMismatchError: if SIDs are of another codec than those it was trained on.
        DataError: on bad data; names file, column and row.
        RunMismatchError: if ``out`` holds another backtest.
    """
    with process_group() as processes:
        if not config.is_backtest:
            trained = TrainedRanker.open(config.ranker)
            parts = _parts(trained, config)
            prepared: Prepared = parts.prepared
            values = _evaluate(trained, parts, config.split, processes)
            if config.prepared is not None:
                values |= _drift(trained, parts, None)
            if processes.is_main and config.out is not None:
                write_json(config.out, values, sealed=True)
        else:
            assert config.out is not None
            with open_run(config.out, config, inputs=config.files()) as run:
                values = run.result or run.finish(_backtest(config, config.out, processes))
            prepared = open_prepared(config.out)
        if processes.is_main:
            show(_json(values))
        check_defined(values, prepared, config.split)
        return values


def _json(values: dict[str, Any]) -> str:
    """JSON, each bucket of a table and each list of numbers on one line; of the bootstrap the intervals alone."""
    intervals = {name: {"interval": own["interval"]} for name, own in values[BOOTSTRAP].items()}
    text = json.dumps(values | {BOOTSTRAP: intervals}, indent=2)
    return re.sub(r"\{[^{}]*\}|\[[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text)


def _parts(trained: TrainedRanker, config: EvaluateConfig) -> RankerParts:
    given = open_prepared(config.prepared or trained.recipe.prepared)
    check_labels(trained.trained_on.prepared, given)
    data = None
    if config.data is not None:
        data = DataFolder.of(config.data, config.schema.over(given.schema.columns_alone))
    return trained.parts(config.prepared, data=data, sids=config.sids)


def _evaluate(trained: TrainedRanker, parts: RankerParts, split: str, processes: Processes) -> dict[str, Any]:
    model = parts.sharded(processes)
    trained.load(model)
    total = parts.prepared.counts[split]["targets"]
    with stage(f"{trained.recipe.arm} {split}", total, show=processes.is_main) as progress:
        return evaluate_in_detail(model, parts.batches(split, processes), processes, progress)


def _backtest(config: EvaluateConfig, out: Path, processes: Processes) -> dict[str, Any]:
    """Prepares what came after the ranker's training, and evaluates on it."""
    trained = TrainedRanker.open(config.ranker)
    own = trained.trained_on.prepared
    on_first_process(lambda: _prepare(config, out, own))
    share(out / SEQUENCES)
    prepared = open_prepared(out)
    assert config.data is not None
    parts = trained.parts(
        prepared.folder, data=replace(DataFolder.of(config.data), schema=prepared.schema), sids=config.sids
    )
    return _evaluate(trained, parts, "test", processes) | _drift(trained, parts, out)


def _drift(trained: TrainedRanker, parts: RankerParts, out: Path | None) -> dict[str, Any]:
    """``drift``, which is printed, and written into a folder if there is one."""
    own = trained.trained_on.prepared

    def report() -> dict[str, Any]:
        found = drift(own, parts.prepared)
        report_drift(found, out)
        return found

    return {"drift": on_first_process(report)}


def _prepare(config: EvaluateConfig, out: Path, own: Prepared) -> None:
    protocol = backtest_config(own, config.test_from, config.policy)
    begin = protocol.period[1]
    if own.last_training_event is not None and begin <= own.last_training_event:
        warn(
            f"the test begins before the end of the ranker's training ({own.last_training_event}): it has been trained on "
            "events that it is tested on"
        )
    if (out / SEQUENCES).exists():
        return  # of a run that was interrupted
    assert config.data is not None
    with stage("prepare sequences", None, show=True) as progress:
        prepared = prepare(DataFolder.of(config.data, config.schema), out / SEQUENCES, protocol, own)
        progress.advance(0, f"test {prepared.counts['test']['targets']:,} targets")
