"""A study's folder and its steps: each leaves its result in a folder of its own, where a second run finds it."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.prepared import COLD_ITEMS_FILE, SEQUENCES, Prepared, open_prepared
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.files import read_object, write_json
from sidrec_torchrec.fusion.config import VQFusionOptions
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.jobs import (
    collaborative_vectors,
    encode_corpus,
    prepare,
    train_ranker,
    train_tokenizer,
    tune_tokenizer,
)
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.study.plans import TokenizerPlan, Variant
from sidrec_torchrec.training.runs import look

COLLABORATIVE = "collaborative"  # the column of what users do with items


@dataclass(frozen=True, kw_only=True)
class StudyProtocol:
    """What is the same for everything a study compares.

    Args:
        protocol: how logs become sequences.
        tokenizer: how tokenizers are trained.
        tuning: the ranker they are tuned through.
        tokenizer_seeds: how many tokenizers of each kind, of seeds that follow each other; rankers take them in turn.
    """

    protocol: PrepareConfig = field(default_factory=PrepareConfig)
    tokenizer: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    tuning: RankerTrainingConfig = field(default_factory=RankerTrainingConfig)
    tokenizer_seeds: int = 1


class Workspace:
    """The steps of a study; call them on every process of the group.

    The one place that says what a tokenizer may see: the items that the protocol does not keep out of training.

    Args:
        out: the study's folder.
        data: the data folder.
        study: what all its steps share.
        tokenizers: folder of a study of the same data and protocol whose tokenizers to use; None for its own.
    """

    def __init__(
        self, out: Path, data: Path | DataFolder, study: StudyProtocol, *, tokenizers: Path | None = None
    ) -> None:
        self.out = Path(out)
        self.data = DataFolder.of(data)
        self.study = study
        self._made = Path(tokenizers or out)
        self._states: dict[str, str] | None = None  # of steps that are planned, not run

    def prepare(self) -> Prepared:
        """The sequences."""
        job = prepare.PrepareJobConfig(**self._data, out=self.out / "prepared", protocol=self.study.protocol)
        self._step("prepare", prepare.main, job)
        return open_prepared(job.out)

    def tokenizers(self, variants: Sequence[Variant]) -> list[TokenizerPlan]:
        """Those that the variants read, of all seeds, each once."""
        seeds = range(self.study.tokenizer_seeds)
        plans = [plan for variant in variants for seed in seeds for plan in variant.of_seed(seed).tokenizers]
        return list({plan.folder: plan for plan in plans}.values())

    def train_tokenizer(self, plan: TokenizerPlan) -> dict[str, Any]:
        """Trains the plan's tokenizer, and tunes it where it is to be; returns the metrics of training."""
        train = train_tokenizer.TrainTokenizerConfig(
            **({"data": self._with_vectors()} if plan.collaborative else self._data),
            out=self._trained(plan),
            source=plan.sources,
            predict=(COLLABORATIVE,) if plan.collaborative else (),
            target=plan.targets,
            exclude=self._sequences / COLD_ITEMS_FILE,
            model=VQFusionOptions(quantizer=plan.quantizer),
            **_seeded(self.study.tokenizer, plan),
        )
        metrics = self._step(f"train tokenizer {plan.folder}", train_tokenizer.main, train)
        if plan.tuned:
            dropout = {} if plan.digit_dropout is None else {"digit_dropout": plan.digit_dropout}
            job = tune_tokenizer.TuneTokenizerConfig(
                **self._data,
                prepared=self._sequences,
                tokenizer=train.out,
                out=self._tokenizer(plan),
                content=train.data,
                **_seeded(self.study.tuning, plan) | dropout,
            )
            self._step(f"tune tokenizer {plan.folder}", tune_tokenizer.main, job)
        return metrics

    def encode(self, plan: TokenizerPlan) -> dict[str, Any]:
        """Encodes the corpus with the plan's trained tokenizer; returns the report."""
        job = encode_corpus.EncodeCorpusConfig(
            **self._data, tokenizer=self._tokenizer(plan), out=self.sids(plan), report="full"
        )
        return self._step(f"encode {plan.folder}", encode_corpus.main, job)

    def sids(self, plan: TokenizerPlan) -> Path:
        """Where the plan's SIDs are."""
        return self._made / "sids" / plan.folder

    def rank(self, variant: Variant, seed: int, *, name: str | None = None) -> dict[str, Any]:
        """Trains and tests a ranker; returns its metrics.

        Args:
            variant: its arm; its SIDs have been encoded.
            seed: of the ranker; its tokenizers are of the same, as far as there are.
            name: of the run's folder, if not ``seed-SEED``.
        """
        variant = variant.of_seed(seed % self.study.tokenizer_seeds)
        job = train_ranker.TrainRankerConfig(
            **self._data,
            prepared=self.out / "prepared" / SEQUENCES,
            out=self.out / "rankers" / variant.name.replace(" ", "-").replace(",", "") / (name or f"seed-{seed}"),
            arm=variant.arm,
            source=variant.sources,
            sids=tuple(self.sids(plan) for plan in variant.tokenizers),
            arm_options=variant.arm_options,
            **_fields(variant.training) | {"seed": seed},
        )
        return self._step(f"train ranker {variant.name} seed {seed}", train_ranker.main, job)

    def plan(self, variants: Sequence[Variant], seeds: int) -> dict[str, str]:
        """Runs nothing: in which state each step is, by name."""
        self._states = {}
        try:
            with suppress(DataError):  # the sequences are read where they are made, and they may not be
                self.prepare()
            for plan in self.tokenizers(variants):
                self.train_tokenizer(plan)
                self.encode(plan)
            for variant in variants:
                for seed in range(seeds):
                    self.rank(variant, seed)
            return self._states
        finally:
            self._states = None

    def seconds(self) -> dict[str, float]:
        """Of each finished step, over all the runs that worked on this folder."""
        path = self.out / "steps.json"
        return read_object(path) if path.exists() else {}

    @property
    def _data(self) -> dict[str, Any]:
        """Fields of a job's config."""
        return {"data": self.data.path, "schema": self.data.schema}

    @property
    def _sequences(self) -> Path:
        """What tokenizers are trained and tuned on."""
        return self._made / "prepared" / SEQUENCES

    def _trained(self, plan: TokenizerPlan) -> Path:
        """The tokenizer before it is tuned."""
        return self._made / "tokenizers" / plan.trained_folder

    def _tokenizer(self, plan: TokenizerPlan) -> Path:
        return self._made / "tokenizers" / plan.tuned_folder if plan.tuned else self._trained(plan)

    def _with_vectors(self) -> Path:
        """A folder of the items with collaborative vectors."""
        job = collaborative_vectors.CollaborativeVectorsConfig(
            **self._data, prepared=self._sequences, out=self._made / "collaborative", column=COLLABORATIVE
        )
        self._step("collaborative vectors", collaborative_vectors.main, job)
        return job.out

    def _step(self, name: str, main: Callable[[Any], Any], job: Any) -> Any:
        """Runs a step; notes its seconds if it was not finished before. While steps are planned, says how it stands instead."""
        if self._states is not None:
            self._states[name] = _state(job)
            return {}
        start = time.monotonic()
        result = main(job)
        if dist.get_rank() == 0:
            steps = self.seconds()
            if name not in steps:
                write_json(self.out / "steps.json", steps | {name: time.monotonic() - start}, sealed=True)
        dist.barrier()
        return result


def _state(job: Any) -> str:
    """In which state a step's folder is."""
    try:
        inputs = job.files()
    except SidrecError:  # of a step that is not done yet
        inputs = []
    return f"{look(job.out, job, inputs)} ({job.out})"


def _seeded(config: Any, plan: TokenizerPlan) -> dict[str, Any]:
    """Fields of a job's config, for a tokenizer of the plan's seed."""
    return _fields(config) | {"seed": config.seed + plan.seed}


def _fields(config: Any) -> dict[str, Any]:
    """Of a config that others extend, for one of them."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
