"""The main job: tokenizers, semantic IDs, a ranker per arm and seed, and a report on what each arm is worth."""

import math
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.format import DataFolder, DataSchema, open_items, validate
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.synthetic import SUMMARY_FILE, SyntheticConfig, write_synthetic
from sidrec_torchrec.environment import is_command_line, versions_and_hardware
from sidrec_torchrec.errors import SidrecError, check_at_least, check_once
from sidrec_torchrec.files import read_object, write_json
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.fusion.training import TokenizerTrainingConfig
from sidrec_torchrec.output import show
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, Needs, Tokenizers
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.storage.urls import as_urls
from sidrec_torchrec.study.explorer import explore
from sidrec_torchrec.study.plans import TokenizerPlan, Variant
from sidrec_torchrec.study.report import REPORT_FILE, print_report, summarize_arm
from sidrec_torchrec.study.report_html import write_html
from sidrec_torchrec.study.workspace import StudyProtocol, Workspace
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.launcher import tell_launcher
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import look, open_run, share

DATA_FOLDER = "data"  # of a corpus that is made
DATA_FILE = "data.json"  # what validation found
REPORT_PAGE = "report.html"
SYNTHETIC_SOURCES, SYNTHETIC_TARGETS = ("text_emb", "image_emb"), ("category", "tags")
_MAY_GROW = ("out", "arms", "seeds")  # fields that may differ from those of an earlier call


@dataclass(frozen=True, kw_only=True)
class PipelineConfig(JobConfig):
    """What to compare, on what.

    Args:
        out: folder for everything the run makes.
        data: folder of ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet``; none given: a synthetic
            corpus is made.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        arms: ways of feeding items to compare, in this order.
        seeds: rankers per arm, with seeds 0, 1, ...
        tokenizer_seeds: tokenizers of each kind, no more than rankers, which take them in turn: with as many, each ranker has a
            tokenizer of its own, and what differs between seeds is due to both.
        source: sources to use; none named means all.
        target: categorical columns the fused tokenizer predicts; none named means no target.
        collaborative: whether the fused tokenizer also predicts what users did with its training items.
        tune: whether the fused tokenizer is then tuned through a ranker.
        fused: digits of the tokenizer of all sources.
        residual: digits of the traditional tokenizers, one per source, that the n-gram arms read.
        protocol: how logs become sequences.
        tokenizer: how tokenizers are trained.
        ranker: the ranker, and how it is trained; its seed is that of tuning, and ``seeds`` those of the arms.
        arm_options: choices within arms.
    """

    out: Path
    data: Path | None = None
    schema: DataSchema = field(default_factory=DataSchema)
    arms: tuple[str, ...] = ("none", "raw", "prefix-ngram", "side", "learned-side", "id")
    seeds: int = 1
    tokenizer_seeds: int = 1
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    collaborative: bool = True
    tune: bool = True
    fused: QuantizerConfig = field(default_factory=QuantizerConfig)
    residual: QuantizerConfig = field(default_factory=lambda: QuantizerConfig(kind="rq", stages="onehot:256*3"))
    protocol: PrepareConfig = field(default_factory=PrepareConfig)
    tokenizer: TokenizerTrainingConfig = field(default_factory=TokenizerTrainingConfig)
    ranker: RankerTrainingConfig = field(default_factory=RankerTrainingConfig)
    arm_options: ArmConfig = field(default_factory=ArmConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.arms)) != len(self.arms) or not self.arms:
            raise SidrecError(f"name each arm once, got '{','.join(self.arms)}'")
        for name in self.arms:
            ARMS[name]  # refuses an unknown one
            self.ranker.model.reader(None).check_arm(name)
        check_once(self, "source", "target")
        check_at_least(self, 1, "seeds", "tokenizer_seeds")
        if self.tokenizer_seeds > self.seeds:
            raise ValueError(
                f"tokenizer_seeds {self.tokenizer_seeds} is more than seeds {self.seeds}: no ranker would read the last"
            )
        # What the steps would refuse is refused before the first of them.
        self.ranker.model.weights(max(len(self.protocol.tasks), 1))
        if self.arm_options.ngram_depth > len(parse_stages(self.residual.stages)):
            raise ValueError(
                f"ngram_depth {self.arm_options.ngram_depth} is more than the digits of {self.residual.stages}"
            )


def main(config: PipelineConfig) -> dict[str, Any]:
    """Runs every step that is not finished yet, prints the table, writes ``report.json`` and ``report.html``.

    Returns:
        The content of ``report.json``.

    Raises:
        DataError: on bad data; names file, column and row.
        RunMismatchError: if ``out`` holds another run, or one of data that have changed.
    """
    with process_group() as processes, open_run(config.out, config, inputs=_inputs(config), ignore=_MAY_GROW):
        data = _make_data(config)
        sources, targets = _columns(config, data)
        workspace = _workspace(config, data)
        variants = _variants(config, sources, targets)
        report = _compare(config, workspace, variants)
        report |= {
            "data": {"folder": as_urls(str(data.path)), "sources": sources, "targets": targets}
            | read_object(config.out / DATA_FILE)
            | _oracle(data),
            "processes": processes.world_size,
        }
        if processes.is_main:
            write_json(config.out / REPORT_FILE, report, sealed=True)
            write_html(report, config.out / REPORT_PAGE, explore(data, _sids(workspace, variants)))
            print_report(report)
            show(f"report: {config.out / REPORT_PAGE}")
        tell_launcher("", {}, config.out / "report.json", config.out / REPORT_PAGE)
        dist.barrier()
        return report


def plan(config: PipelineConfig) -> dict[str, str]:
    """Runs nothing: in which state each step is, by name.

    Raises:
        DataError: on unknown columns, or data that are not there.
    """
    state = look(config.out, config, _inputs(config), ignore=_MAY_GROW)
    if state not in ("new", "begun, and would go on"):
        return {f"pipeline {config.out}": state}
    data = DataFolder.of(config.data or config.out / DATA_FOLDER, config.schema)
    if config.data is None and not data.has("items"):
        sources, targets = config.source or SYNTHETIC_SOURCES, config.target or SYNTHETIC_TARGETS
    else:
        sources, targets = _columns(config, data)
    steps = {"data": "made and checked" if (config.out / DATA_FILE).exists() else "to be made or checked"}
    steps |= _workspace(config, data).plan(_variants(config, sources, targets), config.seeds)
    report = config.out / REPORT_PAGE
    return steps | {"report": f"{'there is one, to be written again' if report.exists() else 'new'} ({report})"}


def _inputs(config: PipelineConfig) -> list[Path]:
    """The files that everything is made of."""
    return [] if config.data is None else list(DataFolder.of(config.data, config.schema).files())


def _columns(config: PipelineConfig, data: DataFolder) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Sources and targets.

    Raises:
        DataError: on one that there is not.
    """
    sources = config.source or tuple(open_items(data).source_dims)
    targets = config.target or (() if config.data else SYNTHETIC_TARGETS)
    open_items(data, sources=sources, targets=targets)
    return sources, targets


def _workspace(config: PipelineConfig, data: DataFolder) -> Workspace:
    tuning = replace(config.ranker, model=replace(config.ranker.model, attention=RankerConfig.attention))
    study = StudyProtocol(
        protocol=config.protocol, tokenizer=config.tokenizer, tuning=tuning, tokenizer_seeds=config.tokenizer_seeds
    )
    return Workspace(config.out, data, study)


def _variants(config: PipelineConfig, sources: tuple[str, ...], targets: tuple[str, ...]) -> list[Variant]:
    """Each arm as it comes, with the tokenizers it reads."""
    fused = TokenizerPlan(
        name="side",
        quantizer=config.fused,
        sources=sources,
        targets=targets,
        collaborative=config.collaborative,
        tuned=config.tune,
    )
    residual = tuple(TokenizerPlan(name=f"rq-{s}", quantizer=config.residual, sources=(s,)) for s in sources)
    tokenizers = {Tokenizers.FUSED: (fused,), Tokenizers.PER_SOURCE: residual}
    return [
        Variant(
            name=arm,
            arm=arm,
            sources=sources if ARMS[arm].needs is Needs.VECTORS else (),
            tokenizers=tokenizers[ARMS[arm].tokenizers] if ARMS[arm].needs is Needs.SIDS else (),
            arm_options=config.arm_options,
            training=config.ranker,
        )
        for arm in config.arms
    ]


def _compare(config: PipelineConfig, workspace: Workspace, variants: list[Variant]) -> dict[str, Any]:
    """Runs the steps; returns what they came to."""
    prepared = workspace.prepare()
    tokenizers = {
        plan.folder: {
            "training": workspace.train_tokenizer(plan),
            "corpus": workspace.encode(plan),
            "digit_bits": [math.log2(radix) for radix in SIDSpec(parse_stages(plan.quantizer.stages), "").radices],
        }
        for plan in workspace.tokenizers(variants)
    }
    runs = {v.name: [workspace.rank(v, seed) for seed in range(config.seeds)] for v in variants}
    base = next((v.name for v in variants if ARMS[v.arm].is_base), None)
    bound = next((runs[v.name] for v in variants if ARMS[v.arm].is_bound), None)
    steps = workspace.seconds()
    sequences = read_object(prepared.folder / "prepared.json")
    return {
        "arms": {arm: summarize_arm(its, runs.get(base or ""), bound) | {"base": base} for arm, its in runs.items()},
        "tokenizer": tokenizers,
        "seeds": config.seeds,
        "tokenizer_seeds": config.tokenizer_seeds,
        "protocol": _protocol(config.protocol, sequences),
        "sequences": sequences,
        "command": _command(),
        **versions_and_hardware(),
        "steps": steps,
        "seconds": sum(steps.values()),
    }


def _sids(workspace: Workspace, variants: list[Variant]) -> dict[str, Path]:
    """Folders of SIDs by tokenizer; those of most sources first."""
    plans = {plan.name: plan for variant in variants for plan in variant.tokenizers}
    return {plan.name: workspace.sids(plan) for plan in sorted(plans.values(), key=lambda plan: -len(plan.sources))}


def _make_data(config: PipelineConfig) -> DataFolder:
    """The data's folder; on the main process makes it if there is none, and checks it, once."""
    data = config.data or config.out / DATA_FOLDER

    def make() -> None:
        if (config.out / DATA_FILE).exists():
            return
        if config.data is None:
            write_synthetic(SyntheticConfig(), data, progress=True)
        with stage("check data", None, show=True) as progress:
            summary = validate(DataFolder.of(data, config.schema), config.protocol.tasks)
            counts = (f"{summary[kind]:,} {kind}" for kind in ("events", "users", "items"))
            progress.advance(0, ", ".join(counts))
        write_json(config.out / DATA_FILE, {"summary": summary}, sealed=True)

    on_first_process(make)
    share(config.out / DATA_FOLDER)
    return DataFolder.of(data, config.schema)


def _oracle(data: DataFolder) -> dict[str, float]:
    """Of a synthetic corpus, the NE of its true probabilities."""
    path = data.path / SUMMARY_FILE
    return {"ne_oracle": read_object(path)["ne_oracle"]} if path.exists() else {}


def _command() -> str:
    """What made the report, as it can be typed again."""
    if is_command_line():
        return " ".join(["sidrec", *map(shlex.quote, sys.argv[1:])])
    return f"{__name__}.main, called from Python"  # whose own arguments, a notebook's kernel's say, are of no interest


def _protocol(protocol: PrepareConfig, sequences: dict[str, Any]) -> str:
    """How targets were made and split, in words."""
    text = protocol.words()
    if sequences["sampled_negatives"]:
        text += (
            " The log holds positives only: each target has one sampled negative, matched in popularity (drawn from the "
            "events of other users in the same split, seen or cold alike)."
        )
    if len(sequences["tasks"]) > 1:
        text += f" The tasks are {', '.join(sequences['tasks'])}; the metrics of an arm alone are the means over them."
    if values := [own["name"] for own in sequences.get("regressions", [])]:
        text += f" Predicted as numbers: {', '.join(values)}; NMSE is the share of the training mean's squared errors that is left."
    return text
