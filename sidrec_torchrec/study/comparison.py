"""Several runs side by side: pipelines, and rankers trained one by one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.like import TRAINED_ON
from sidrec_torchrec.data.prepared import PREPARED_FILE
from sidrec_torchrec.errors import DataError, RunMismatchError, SidrecError
from sidrec_torchrec.files import read_object
from sidrec_torchrec.ranker.arms import ARMS
from sidrec_torchrec.ranker.evaluation import BREAKDOWN, RELIABILITY
from sidrec_torchrec.ranker.trained_on import ARM_FILE
from sidrec_torchrec.study.intervals import Interval, differences
from sidrec_torchrec.study.looks import Look
from sidrec_torchrec.study.report import REPORT_FILE, summarize_arm
from sidrec_torchrec.study.results import PARTS, Results, by_seed, paired
from sidrec_torchrec.training.config import without, without_paths
from sidrec_torchrec.training.runs import CONFIG_FILE, INPUTS, RESULT_FILE

# What of the prepared sequences must be alike for metrics to be comparable: all but how columns are called.
_NAMES_ALONE = ("schema", "met", "vocabularies", "profile")
_PLACE = (
    "out",
    "data",
    "schema",
    "prepared",
    "sids",
    "init",
    "seed",
    "seeds",
    "arms",
    "checkpoint_minutes",
    "keep_epochs",
    "checkpoint_batches",
)


@dataclass(frozen=True)
class ComparedRun:
    """One run, as it is compared.

    Args:
        label: what it is called.
        arms: summaries by name; see ``summarize_arm``.
        sequences: ``prepared.json`` of what it was trained and tested on.
        config: its fields by dotted path, without paths.
        report: of a pipeline; what a ranker by itself has of it.
    """

    label: str
    arms: dict[str, dict[str, Any]]
    sequences: dict[str, Any]
    config: dict[str, Any]
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Difference:
    """An arm beside another one of another run.

    Args:
        name: of the arm.
        beside: of the other.
        look: of the arm.
        seeds: that both have.
        values: NE of the arm less that of the other, by part of the test targets.
    """

    name: str
    beside: str
    look: Look
    seeds: int
    values: dict[str, Interval]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Args:
        report: as that of one pipeline, of all their arms.
        differences: paired by seed; none where the runs are of different data or protocols.
        settings: fields that differ, each with its value in every run.
        labels: of the runs.
        warnings: what makes them hard to compare.
        made: what made each, in words and as a command.
    """

    report: dict[str, Any]
    differences: list[Difference]
    settings: dict[str, list[Any]]
    labels: list[str]
    warnings: list[str]
    made: list[dict[str, str]]


def compare(folders: Sequence[Path], *, across: bool = False) -> Comparison:
    """Reads runs and puts them side by side.

    Args:
        folders: of pipelines, or of rankers that train-ranker trained; those alike but for the seed become one arm.
        across: whether they may be of different data or protocols; then nothing is subtracted.

    Raises:
        SidrecError: on a folder that is no finished run.
        RunMismatchError: if two are of different data or protocols, unless ``across``: names what differs.
    """
    labels = _labels(folders)
    pipelines = [label for label in labels if (labels[label] / REPORT_FILE).exists()]
    rankers = {label: folder for label, folder in labels.items() if label not in pipelines}
    runs = [*(_pipeline(label, labels[label]) for label in pipelines), *_rankers(rankers)]
    alike = [_unlike(runs[0], run) for run in runs[1:]]
    unlike = [f"{run.label}: {'; '.join(what)}" for run, what in zip(runs[1:], alike, strict=True) if what]
    if unlike and not across:
        raise RunMismatchError(
            f"not comparable with {runs[0].label}: {' | '.join(unlike)}; name runs of the same data and protocol, or give --across "
            "to see them side by side, without differences"
        )
    report = _joined(runs, is_alike=not unlike)
    return Comparison(
        report=report,
        differences=[] if unlike else [*_differences(Results(report))],
        settings=_settings(runs),
        labels=[run.label for run in runs],
        warnings=[
            f"Of different data or protocols: compare gains, not NE, and those with care. {words}." for words in unlike
        ],
        made=[{"words": f"{run.label}:", "command": run.report.get("command", "sidrec train-ranker")} for run in runs],
    )


def _labels(folders: Sequence[Path]) -> dict[str, Path]:
    """Each folder by its name, with as many of those above as tell it from the others."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise SidrecError("name each run once")
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        labels = {"/".join(path.parts[-count:]): folder for path, folder in zip(paths, folders, strict=True)}
        if len(labels) == len(paths):
            break
    return labels


def _pipeline(label: str, folder: Path) -> ComparedRun:
    report = read_object(folder / REPORT_FILE)
    base = next((name for name in report["arms"] if name in ARMS and ARMS[name].is_base), None)
    none: dict[str, Any] = {BREAKDOWN: {}, RELIABILITY: {}, "validation": [], "targets": {}, "base": base}
    arms = {name: none | {"arm": name} | summary for name, summary in report["arms"].items()}
    return ComparedRun(label, arms, report["sequences"], _config(folder), report)


def _rankers(folders: dict[str, Path]) -> Iterator[ComparedRun]:
    """Rankers that are alike but for the seed, together."""
    groups: dict[str, list[tuple[str, Path, dict[str, Any]]]] = {}
    for label, folder in folders.items():
        if not (folder / RESULT_FILE).exists() or "arm" not in (metrics := read_object(folder / RESULT_FILE)):
            raise SidrecError(
                f"{folder}: neither a finished pipeline ({REPORT_FILE}) nor a finished ranker ({RESULT_FILE}); run it to its end, or name "
                "another folder"
            )
        made_of = folder / TRAINED_ON / ARM_FILE
        made = read_object(made_of) if made_of.exists() else None
        key = repr((_config(folder), made, _comparable(_sequences(folder))))
        while any(metrics["seed"] == other["seed"] for _, _, other in groups.get(key, [])):
            key += " again"
        groups.setdefault(key, []).append((label, folder, metrics))
    bases = [[m for *_, m in group] for group in groups.values() if ARMS[group[0][2]["arm"]].is_base]
    for group in groups.values():
        label, folder, first = group[0]
        runs = sorted((metrics for *_, metrics in group), key=lambda metrics: metrics["seed"])
        summary = summarize_arm(runs, bases[0] if bases else None)
        yield ComparedRun(label, {first["arm"]: summary}, _sequences(folder), _config(folder))


def _sequences(folder: Path) -> dict[str, Any]:
    path = folder / TRAINED_ON / PREPARED_FILE
    if not path.exists():
        raise DataError(f"{path}: not found; a version that did not keep it trained this ranker: train it again")
    return read_object(path)


def _config(folder: Path) -> dict[str, Any]:
    value = read_object(folder / CONFIG_FILE) if (folder / CONFIG_FILE).exists() else {}
    return _flat(without(without_paths(value), (*_PLACE, INPUTS)))


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, its in value.items():
        found |= _flat(its, f"{prefix}{name}.") if isinstance(its, dict) else {f"{prefix}{name}": its}
    return found


def _unlike(one: ComparedRun, other: ComparedRun) -> list[str]:
    """In words, what makes metrics of the two incomparable."""
    values = [_comparable(run.sequences) for run in (one, other)]
    shared = values[0].keys() & values[1].keys()
    found = [
        f"{'the ' + name.removeprefix('data.') + ' files' if name.startswith('data.') else name} "
        + ("differ" if name.startswith(("data.", "test ")) else f"{values[0][name]!r} there, {values[1][name]!r} here")
        for name in values[0]
        if name in shared and values[0][name] != values[1][name]
    ]
    protocols = [run.report.get("protocol") for run in (one, other)]
    return found + ["the protocol differs"] * (None not in protocols and protocols[0] != protocols[1] and not found)


def _comparable(sequences: dict[str, Any]) -> dict[str, Any]:
    """By dotted path, what says which events are trained and tested on."""
    lengths = sequences.get("profile", {}).get("test", {}).get("history_lengths")
    return _flat(without(sequences, _NAMES_ALONE)) | {"test history lengths": lengths}


def _joined(runs: list[ComparedRun], *, is_alike: bool) -> dict[str, Any]:
    """One report of all arms; an arm that several runs have is named with its run."""
    first = next((run.report for run in runs if run.report), {})
    kinds = [name for run in runs for name in run.arms]
    arms: dict[str, Any] = {}
    base_of = next((name for run in runs for name in run.arms if name in ARMS and ARMS[name].is_base), None)
    for run in runs:
        names = {name: name if kinds.count(name) == 1 else f"{name}, {run.label}" for name in run.arms}
        own_base = names.get(base_of or "")
        for name, summary in run.arms.items():
            arms[names[name]] = summary | {"base": own_base}
    if is_alike:  # of the same data, so a run without the base may have another's
        base = next((summary["base"] for summary in arms.values() if summary["base"]), None)
        arms = {name: summary | {"base": summary["base"] or base} for name, summary in arms.items()}
    for place, (name, summary) in enumerate(arms.items()):
        earlier = [*arms.values()][:place]
        arms[name] = summary | {"run": sum(other["arm"] == summary["arm"] for other in earlier)}
    first_of = [summary["arm"] for summary in arms.values()]
    return {
        "arms": dict(
            sorted(arms.items(), key=lambda one: first_of.index(one[1]["arm"]))
        ),  # the same arm of all runs together
        "is_of_one_data": is_alike,
        "sequences": runs[0].sequences,
        "data": first.get("data", {}) if is_alike else {},
        "protocol": " ".join(dict.fromkeys(run.report["protocol"] for run in runs if "protocol" in run.report)),
        "seeds": max(len(by_seed(summary)) for summary in arms.values()),
        "versions": first.get("versions", {}),
    }


def _differences(results: Results) -> Iterator[Difference]:
    """Each arm beside the same of an earlier run; where no two runs share an arm, each beside the first."""
    arms, kind = results.arms, results.kind
    end = next(iter(results.metrics.values()))[1]
    kinds = [arm.kind for arm in arms]
    is_shared = len(set(kinds)) < len(kinds)
    for place, arm in enumerate(arms):
        beside = next((other for other in arms[:place] if not is_shared or other.kind == arm.kind), None)
        if beside is None:
            continue
        pairs = {part: paired(beside.summary, arm.summary, f"{kind}_{part}{end}") for part in PARTS}
        values = {part: found for part, pair in pairs.items() if (found := Interval.of(differences(*pair)))}
        if values:
            yield Difference(arm.name, beside.name, arm.look, len(pairs["warm"][0]), values)


def _settings(runs: list[ComparedRun]) -> dict[str, list[Any]]:
    """Fields, and versions, that all runs have and that differ."""
    of_runs = [
        run.config | {f"version of {name}": value for name, value in run.report.get("versions", {}).items()}
        for run in runs
    ]
    shared = [name for name in of_runs[0] if all(name in values for values in of_runs)]
    found = {name: [values[name] for values in of_runs] for name in shared}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}
