"""The main job: tokenizers, semantic IDs, a ranker per arm and seed, and a report on what each arm is worth."""

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.data.fingerprint import data_fingerprint
from sidrec_torchrec.data.format import open_items, validate
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.environment import is_command_line, versions_and_hardware
from sidrec_torchrec.errors import RunMismatchError, SidrecError, check_at_least, check_once
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.jobs import (
    collaborative_vectors,
    encode_corpus,
    prepare,
    train_ranker,
    train_tokenizer,
    tune_tokenizer,
)
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, Needs, Tokenizers
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.sharding import OptimizerConfig
from sidrec_torchrec.study.report import print_report, summarize_arm
from sidrec_torchrec.study.report_html import write_html
from sidrec_torchrec.training.group import Processes, process_group
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import open_run

SYNTHETIC_TARGETS = ("category", "tags")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What to compare, on what.

    Args:
        out: folder for everything the run makes.
        data: folder of ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet``; none given: a synthetic
            corpus is made.
        arms: ways of feeding items to compare, in this order.
        seeds: rankers per arm, with seeds 0, 1, ...
        source: sources to use; none named means all.
        target: categorical columns the fused tokenizer predicts; none named means no target.
        collaborative: whether the fused tokenizer also predicts what users did with its training items.
        tune: whether the fused tokenizer is then tuned through a ranker.
        tasks: columns of labels to predict, four at most; none named means ``label``, or, without such a column, whether an
            event is one or a sampled negative.
        cold_fraction: share of the items kept out of training (of tokenizers too), to test on unseen items.
        train_fraction: share of the users that is trained on; all are tested.
        max_history: most events before a row's first target.
        stages: the fused tokenizer's digits.
        rq_stages: digits of the traditional tokenizers, one per source, that the n-gram arms read.
        tokenizer_epochs: most passes over the items for each tokenizer.
        epochs: passes over the training sequences.
        batch_events: events in a batch over all processes, padding included; 0 for a fiftieth of the training events,
            but 512 at least and 8,192 at most.
        model: sizes of the ranker.
        arm: choices within arms.
        optimizer: rates and schedule of the ranker.
    """

    out: Path
    data: Path | None = None
    arms: tuple[str, ...] = ("none", "raw", "prefix-ngram", "side", "learned-side", "id")
    seeds: int = 1
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    collaborative: bool = True
    tune: bool = True
    tasks: tuple[str, ...] = ()
    cold_fraction: float = 0.25
    train_fraction: float = 1.0
    max_history: int = 512
    stages: str = "ternary*25"
    rq_stages: str = "onehot:256*3"
    tokenizer_epochs: int = 40
    epochs: int = 5
    batch_events: int = 0
    model: RankerConfig = field(default_factory=RankerConfig)
    arm: ArmConfig = field(default_factory=ArmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise SidrecError(f"name each arm once, got '{','.join(self.arms)}'")
        for name in self.arms:
            ARMS[name]  # refuses an unknown one
            self.model.reader.check_arm(name)
        check_once(self, "source", "target")
        check_at_least(self, 1, "seeds", "epochs")
        check_at_least(self, 0, "tokenizer_epochs", "batch_events")
        # What the steps would refuse is refused before the first of them.
        self.protocol()
        self.model.weights(max(len(self.tasks), 1))
        QuantizerConfig(kind="dpca", stages=self.stages)
        quantizer = QuantizerConfig(kind="rq", stages=self.rq_stages)
        if self.arm.ngram_depth > len(parse_stages(quantizer.stages)):
            raise ValueError(f"ngram_depth {self.arm.ngram_depth} is more than the digits of {self.rq_stages}")

    def protocol(self) -> PrepareConfig:
        """How logs become sequences."""
        return PrepareConfig(
            cold_fraction=self.cold_fraction,
            train_fraction=self.train_fraction,
            tasks=self.tasks,
            max_history=self.max_history,
        )


def main(config: PipelineConfig) -> dict[str, Any]:
    """Runs every step that is not finished yet, prints the table, writes ``report.json`` and ``report.html``.

    Returns:
        The content of ``report.json``.

    Raises:
        DataError: on bad data; names file, column and row.
        RunMismatchError: if ``out`` holds another run.
    """
    with process_group() as processes, open_run(config.out, config, ignore=("out", "arms", "seeds")):
        report = _Pipeline(config, processes).run()
        if processes.is_main:
            write_json(config.out / "report.json", report)
            write_html(report, config.out)
            print_report(report)
            print(f"report: {config.out / 'report.html'}")
        dist.barrier()
        return report


class _Pipeline:
    """One run; its steps leave their results in folders of ``out``, so that a second run finds them."""

    def __init__(self, config: PipelineConfig, processes: Processes) -> None:
        self.config = config
        self.processes = processes
        self.out = config.out
        self.data = config.data or config.out / "data"

    def run(self) -> dict[str, Any]:
        self._open_data()
        self.sources = self.config.source or tuple(open_items(self.data).source_dims)
        self.targets = self.config.target or (() if self.config.data else SYNTHETIC_TARGETS)
        open_items(self.data, sources=self.sources, targets=self.targets)  # refuses unknown columns
        self._prepare()
        tokenizers = {}
        if self._reads_sids_of(Tokenizers.FUSED):
            tokenizers["side"] = self._tokenize(
                "side", self.sources, self.targets, "dpca", self.config.stages, fused=True
            )
        if self._reads_sids_of(Tokenizers.PER_SOURCE):
            for source in self.sources:
                tokenizers[f"rq-{source}"] = self._tokenize(f"rq-{source}", (source,), (), "rq", self.config.rq_stages)
        runs = {arm: [self._rank(arm, seed) for seed in range(self.config.seeds)] for arm in self.config.arms}
        return self._report(tokenizers, runs)

    def _prepare(self) -> None:
        job = prepare.PrepareJobConfig(data=self.data, out=self.out / "prepared", protocol=self.config.protocol())
        self._timed("prepare", lambda: prepare.main(job))

    def _tokenize(
        self,
        name: str,
        sources: tuple[str, ...],
        targets: tuple[str, ...],
        kind: str,
        stages: str,
        *,
        fused: bool = False,
    ) -> dict[str, Any]:
        """Trains a tokenizer and encodes the corpus with it; returns its metrics."""
        collaborative = fused and self.config.collaborative
        train = train_tokenizer.TrainTokenizerConfig(
            data=self._with_vectors() if collaborative else self.data,
            out=self.out / "tokenizers" / name,
            source=sources,
            predict=("collaborative",) if collaborative else (),
            target=targets,
            epochs=self.config.tokenizer_epochs,
            quantizer=QuantizerConfig(kind=kind, stages=stages),
            exclude=self.out / "prepared" / "sequences" / "cold_items.parquet",
        )
        metrics = self._timed(f"train tokenizer {name}", lambda: train_tokenizer.main(train))
        tokenizer = self._tuned(name, train) if fused and self.config.tune else train.out
        encode = encode_corpus.EncodeCorpusConfig(data=self.data, tokenizer=tokenizer, out=self.out / "sids" / name)
        report = self._timed(f"encode {name}", lambda: encode_corpus.main(encode))
        return {"training": metrics, "corpus": report}

    def _tuned(self, name: str, trained: train_tokenizer.TrainTokenizerConfig) -> Path:
        """A folder of the tokenizer, tuned through a ranker as large as those that are compared."""
        job = tune_tokenizer.TuneTokenizerConfig(
            data=self.data,
            prepared=self.out / "prepared" / "sequences",
            tokenizer=trained.out,
            out=self.out / "tokenizers" / f"{name}-tuned",
            content=trained.data,
            epochs=self.config.epochs,
            batch_events=self.config.batch_events,
            model=dataclasses.replace(self.config.model, attention=RankerConfig.attention),
            optimizer=self.config.optimizer,
        )
        self._timed(f"tune tokenizer {name}", lambda: tune_tokenizer.main(job))
        return job.out

    def _with_vectors(self) -> Path:
        """A folder of the items with collaborative vectors."""
        job = collaborative_vectors.CollaborativeVectorsConfig(
            data=self.data, prepared=self.out / "prepared" / "sequences", out=self.out / "collaborative"
        )
        self._timed("collaborative vectors", lambda: collaborative_vectors.main(job))
        return job.out

    def _rank(self, arm: str, seed: int) -> dict[str, Any]:
        job = train_ranker.TrainRankerConfig(
            data=self.data,
            prepared=self.out / "prepared" / "sequences",
            out=self.out / "rankers" / arm / f"seed-{seed}",
            arm=arm,
            source=self.sources if ARMS[arm].needs is Needs.VECTORS else (),
            sids=self._sids(arm),
            epochs=self.config.epochs,
            batch_events=self.config.batch_events,
            seed=seed,
            model=self.config.model,
            arms=self.config.arm,
            optimizer=self.config.optimizer,
        )
        return self._timed(f"train ranker {arm} seed {seed}", lambda: train_ranker.main(job))

    def _sids(self, arm: str) -> tuple[Path, ...]:
        """Folders of the SIDs an arm reads."""
        if ARMS[arm].needs is not Needs.SIDS:
            return ()
        names = {Tokenizers.FUSED: ["side"], Tokenizers.PER_SOURCE: [f"rq-{source}" for source in self.sources]}
        return tuple(self.out / "sids" / name for name in names[ARMS[arm].tokenizers])

    def _reads_sids_of(self, tokenizers: Tokenizers) -> bool:
        """Whether there is an arm that reads SIDs which these make."""
        kinds = [ARMS[arm] for arm in self.config.arms]
        return any(kind.needs is Needs.SIDS and kind.tokenizers is tokenizers for kind in kinds)

    def _report(self, tokenizers: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        sequences = read_json(self.out / "prepared" / "sequences" / "prepared.json")
        steps = self._steps()
        base = next((results for arm, results in runs.items() if ARMS[arm].is_base), None)
        return {
            "arms": {arm: summarize_arm(results, base) for arm, results in runs.items()},
            "tokenizer": tokenizers,
            "seeds": self.config.seeds,
            "protocol": _protocol(self.config, sequences),
            "data": {"folder": str(self.data), "sources": self.sources, "targets": self.targets}
            | read_json(self.out / "data.json"),
            "sequences": sequences,
            "command": _command(),
            **versions_and_hardware(),
            "processes": self.processes.world_size,
            "steps": steps,
            "seconds": sum(steps.values()),
        }

    def _steps(self) -> dict[str, float]:
        """Seconds of each finished step, over all the runs that worked on this folder."""
        path = self.out / "steps.json"
        return read_json(path) if path.exists() else {}

    def _timed(self, name: str, job: Callable[[], Any]) -> Any:
        """Runs a step; notes its seconds if it was not finished before."""
        start = time.monotonic()
        result = job()
        if self.processes.is_main:
            steps = self._steps()
            if name not in steps:
                write_json(self.out / "steps.json", steps | {name: time.monotonic() - start})
        dist.barrier()
        return result

    def _open_data(self) -> None:
        """Makes or checks the data on the main process; refuses data that changed since the run began."""
        message = [None]
        if self.processes.is_main:
            try:
                self._check_data(self.out / "data.json")
            except SidrecError as error:
                message = [error]
        dist.broadcast_object_list(message)
        if message[0] is not None:
            raise message[0]

    def _check_data(self, path: Path) -> None:
        if path.exists():
            if read_json(path)["fingerprint"] != data_fingerprint(self.data):
                raise RunMismatchError(f"{self.out}: {self.data} changed since this run began; give another --out")
            return
        if self.config.data is None:
            write_synthetic(SyntheticConfig(), self.data, progress=True)
        with stage("check data", None, show=True) as progress:
            summary = validate(self.data, self.config.tasks)
            progress.advance(0, f"{summary['events']:,} events, {summary['users']:,} users, {summary['items']:,} items")
        write_json(path, {"summary": summary, "fingerprint": data_fingerprint(self.data)})


def _command() -> str:
    """What made the report, as it can be typed again."""
    if is_command_line():
        return " ".join(["sidrec", *map(shlex.quote, sys.argv[1:])])
    return f"{__name__}.main, called from Python"  # whose own arguments, a notebook's kernel's say, are of no interest


def _protocol(config: PipelineConfig, sequences: dict[str, Any]) -> str:
    """How targets were made and split, in words."""
    text = (
        "Per user, the last 20% of events are the test targets and read every earlier event; "
        f"{config.cold_fraction:.0%} of the items, drawn at random, are kept out of training (cold)."
    )
    if config.train_fraction < 1:
        text += f" {config.train_fraction:.0%} of the users, drawn at random, are trained on; all are tested."
    if sequences["sampled_negatives"]:
        text += (
            " The log holds positives only: each target has one sampled negative, matched in popularity (drawn from the "
            "events of other users in the same split, seen or cold alike)."
        )
    if len(sequences["tasks"]) > 1:
        text += f" The tasks are {', '.join(sequences['tasks'])}; the metrics of an arm alone are the means over them."
    return text
