"""How many digits a corpus needs: SIDs of several lengths, each read by a small ranker, and the shortest that is good enough."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.format import DataConfig, open_items
from sidrec_torchrec.errors import SidrecError, check_at_least
from sidrec_torchrec.fusion.config import QuantizerConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.training import RankerTrainingConfig
from sidrec_torchrec.study.plans import TokenizerPlan, Variant
from sidrec_torchrec.study.workspace import StudyProtocol, Workspace
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.runs import look, open_run

_RAW, _NONE = "raw", "none"


def _small() -> RankerTrainingConfig:
    return RankerTrainingConfig(epochs=2, model=RankerConfig(dim=32))


@dataclass(frozen=True, kw_only=True)
class CodecDigitsConfig(StudyProtocol, DataConfig):
    """What to try, on what.

    Args:
        out: folder for everything the run makes.
        stages: digits to try; see ``QuantizerConfig``.
        tolerance: how much more NE than the best of them is good enough.
        seeds: rankers per list of digits, with seeds 0, 1, ...
        source: sources to use; none named means all.
        target: categorical columns the tokenizers predict.
        collaborative: whether tokenizers also predict what users did with their training items.
        tune: whether tokenizers are then tuned through a ranker.
        ranker: the ranker, small by default, and how it is trained.

    Raises:
        SidrecError: if no user is left out for validation, or a list of stages is named twice.
        ValueError: on stages that cannot be read, or values out of range.
    """

    out: Path
    stages: tuple[str, ...] = ("ternary*10", "ternary*25", "ternary*39", "ternary*60")
    tolerance: float = 0.003
    seeds: int = 1
    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()
    collaborative: bool = True
    tune: bool = True
    ranker: RankerTrainingConfig = field(default_factory=_small)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "seeds")
        check_at_least(self, 0, "tolerance")
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise SidrecError(f"name each list of stages once, got '{' '.join(self.stages)}'")
        if not self.protocol.validation_fraction:
            raise SidrecError("digits are chosen by users left out for validation: give --validation-fraction above 0")
        for stages in self.stages:
            parse_stages(stages)  # refuses what it cannot read


def main(config: CodecDigitsConfig) -> dict[str, Any]:
    """Measures the NE of validation users, whom no ranker trains on; prints every candidate and the choice.

    Besides the candidates, ``raw`` vectors and ``none`` are read, between which SIDs lie: where ``raw`` is far ahead of them all, more
    digits, or a tokenizer trained for longer, may be worth it.

    Returns:
        The content of ``metrics.json``: ``chosen``, and by name of all that was read ``validation_ne``, one per seed, ``bits`` and
        ``bytes_per_event_stored``.

    Raises:
        DataError: on bad data; names file, column and row.
    """
    with process_group() as processes, open_run(config.out, config, inputs=config.folder.files()) as run:
        result = run.result or run.finish(_measure(config))
        if processes.is_main:
            _print(config, result)
        return result


def plan(config: CodecDigitsConfig) -> dict[str, str]:
    """Runs nothing: in which state each step is, by name.

    Raises:
        DataError: on data that are not there.
    """
    state = look(config.out, config, config.folder.files())
    if state not in ("new", "begun, and would go on"):
        return {f"codec digits {config.out}": state}
    return Workspace(config.out, config.folder, config).plan(_variants(config), config.seeds)


def _measure(config: CodecDigitsConfig) -> dict[str, Any]:
    workspace = Workspace(config.out, config.folder, config)
    workspace.prepare()
    found = {}
    for variant in _variants(config):
        for plan in variant.tokenizers:
            workspace.train_tokenizer(plan)
            workspace.encode(plan)
        results = [workspace.rank(variant, seed) for seed in range(config.seeds)]
        found[variant.name] = {
            "validation_ne": [result["validation"][result["best_epoch"]]["ne_all"] for result in results],
            "bytes_per_event_stored": results[0]["bytes_per_event_stored"],
            "bits": sum(SIDSpec(parse_stages(plan.quantizer.stages), "").bits for plan in variant.tokenizers),
        }
    return {"chosen": _choose(config, found), "found": found}


def _variants(config: CodecDigitsConfig) -> list[Variant]:
    sources = config.source or tuple(open_items(config.folder).source_dims)
    plans = [
        TokenizerPlan(
            name=stages.replace(":", "-").replace(",", "-").replace("*", "x"),
            quantizer=QuantizerConfig(stages=stages),
            sources=sources,
            targets=config.target,
            collaborative=config.collaborative,
            tuned=config.tune,
        )
        for stages in config.stages
    ]
    return [
        Variant(name=_NONE, arm=_NONE, training=config.ranker),
        Variant(name=_RAW, arm=_RAW, sources=sources, training=config.ranker),
        *(
            Variant(name=plan.quantizer.stages, arm="side", tokenizers=(plan,), training=config.ranker)
            for plan in plans
        ),
    ]


def _mean(found: dict[str, Any], name: str) -> float:
    values = found[name]["validation_ne"]
    return sum(values) / len(values)


def _choose(config: CodecDigitsConfig, found: dict[str, Any]) -> str:
    """Of those within the tolerance of the best, the one of the fewest bits."""
    best = min(_mean(found, stages) for stages in config.stages)
    good = [stages for stages in config.stages if _mean(found, stages) <= best + config.tolerance]
    return min(good, key=lambda stages: found[stages]["bits"])


def _print(config: CodecDigitsConfig, result: dict[str, Any]) -> None:
    found = result["found"]
    none, raw = _mean(found, _NONE), _mean(found, _RAW)
    table = Table(title=f"NE of validation users, {config.seeds} seed(s)")
    for name in ("digits", "bits", "bytes in a log", "NE", "gain kept of raw's"):
        table.add_column(name, justify="left" if name == "digits" else "right")
    for name, row in found.items():
        ne = _mean(found, name)
        kept = "" if name in (_NONE, _RAW) or raw >= none else f"{(none - ne) / (none - raw):.0%}"
        bold = "bold" if name == result["chosen"] else None
        table.add_row(
            name, f"{row['bits']:.1f}" if row["bits"] else "", f"{row['bytes_per_event_stored']:.1f}", f"{ne:.4f}", kept,
            style=bold,
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"Chosen: {result['chosen']}, the fewest bits within {config.tolerance} of the best.",
        highlight=False,
        markup=False,
    )
