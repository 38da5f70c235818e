"""A report as the page's parts ask for it: arms with their looks, and gains and metrics as intervals over seeds."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sidrec_torchrec.ranker.arms import ARMS
from sidrec_torchrec.ranker.evaluation import BREAKDOWN, RELIABILITY
from sidrec_torchrec.study.intervals import Interval, gains
from sidrec_torchrec.study.looks import Look, look_of
from sidrec_torchrec.study.report import task_metrics

PARTS = {"warm": "items seen in training (warm)", "cold": "items new to the ranker (cold)"}


@dataclass(frozen=True)
class Arm:
    """One arm of a report.

    Args:
        name: as tables and pictures call it.
        kind: its name in ``ARMS``.
        summary: see ``summarize_arm``.
        base: what its gains are relative to; None if that was not run.
    """

    name: str
    kind: str
    summary: dict[str, Any]
    base: dict[str, Any] | None

    @property
    def look(self) -> Look:
        return look_of(self.kind, self.summary.get("run", 0))

    @property
    def words(self) -> str:
        """What the ranker gets of an item: the first line of the class's docstring."""
        text = (
            (ARMS[self.kind].__doc__ or "") if self.kind in ARMS else "an arm of a package that is not installed here"
        )
        return text.strip().partition("\n")[0].replace("``", "`")

    @property
    def is_base(self) -> bool:
        return self.kind in ARMS and ARMS[self.kind].is_base

    @property
    def is_bound(self) -> bool:
        """Whether it has all of the content, which others condense."""
        return self.kind in ARMS and ARMS[self.kind].is_bound

    def metric(self, name: str) -> Interval | None:
        return Interval.of(self.summary.get(name, []))

    def gain(self, name: str) -> Interval | None:
        """Of a metric, relative to the base, in percent, paired by seed; None where it is not defined."""
        if self.base is None or name not in self.base:
            return None
        found = Interval.of(gains(*paired(self.base, self.summary, name)))
        return None if found is None else found * 100


@dataclass(frozen=True)
class Results:
    """A report, read.

    Args:
        report: the content of ``report.json``.
    """

    report: dict[str, Any]

    @property
    def arms(self) -> list[Arm]:
        summaries = self.report["arms"]
        return [
            Arm(name, summary.get("arm") or name, summary, summaries.get(summary.get("base")))
            for name, summary in summaries.items()
        ]

    @property
    def gaining(self) -> list[Arm]:
        """Arms that have gains to show: all but those that gains are relative to."""
        return [arm for arm in self.arms if arm.base is not None and not arm.is_base]

    @property
    def base_names(self) -> str:
        """As text of the page has them, names in backticks."""
        return " or ".join(dict.fromkeys(f"`{arm.kind}`" for arm in self.arms if arm.is_base))

    @property
    def bounds(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.is_bound]

    def kept(self, arm: Arm, name: str) -> float | None:
        """The share of what all of the content gains that an arm has; None where that is nothing, or was not run with it."""
        bound = self.bound_of(arm)
        own, most = arm.gain(name), bound and bound.gain(name)
        return None if own is None or not most or most.mean <= 0 else own.mean / most.mean

    def bound_of(self, arm: Arm) -> Arm | None:
        """The arm of all of the content whose gains are relative to the same."""
        return next((bound for bound in self.bounds if bound.base is arm.base), None)

    @property
    def is_of_one_data(self) -> bool:
        """Whether all arms are of the same data and protocol, as those of a pipeline are."""
        return self.report.get("is_of_one_data", True)

    @property
    def tasks(self) -> list[str]:
        """What is predicted: tasks first, then numbers."""
        sequences = self.report["sequences"]
        return [*sequences["tasks"], *(own["name"] for own in sequences.get("regressions", []))]

    @property
    def metrics(self) -> dict[str, tuple[str, str]]:
        """See ``task_metrics``."""
        return task_metrics(self.report)

    @property
    def kind(self) -> str:
        """The metric that counts: ``ne``, or ``nmse`` where only numbers are predicted."""
        return next(iter(self.metrics.values()))[0]

    @property
    def seeds(self) -> int:
        """Most seeds of an arm."""
        return max(len(by_seed(arm.summary)) for arm in self.arms)

    @property
    def positives(self) -> float | None:
        """Share of the test targets of the first task that are positive; None if that is not known, or not the same for all arms."""
        if not self.is_of_one_data:
            return None
        for arm in self.arms:
            for tables in arm.summary[BREAKDOWN].values():
                rows = tables.get(self.report["sequences"]["tasks"][0]) if self.report["sequences"]["tasks"] else None
                if rows and sum(row["targets"] for row in rows):
                    return sum(row["positives"] for row in rows) / sum(row["targets"] for row in rows)
        return None

    @property
    def oracle(self) -> float | None:
        """NE of the true probabilities of a synthetic corpus; None where they are not known, or another label is predicted."""
        return self.report.get("data", {}).get("ne_oracle") if self.tasks == ["label"] else None

    def rows(self, table: str, task: str) -> dict[str, list[dict[str, Any]]]:
        """By arm, the rows of a table of buckets; without arms that have none."""
        found = {arm.name: arm.summary[BREAKDOWN].get(table, {}).get(task) for arm in self.arms}
        return {name: rows for name, rows in found.items() if rows}

    def bucket_values(self, arm: Arm, table: str, task: str) -> Iterator[float | None]:
        """By bucket, the mean gain in percent; where there is no base, the mean NE or NMSE."""
        its = arm.base[BREAKDOWN].get(table, {}).get(task) if arm.base else None
        for place, row in enumerate(arm.summary[BREAKDOWN][table][task]):
            own = row.get("ne", row.get("nmse"))
            if its is not None:
                base = its[place].get("ne", its[place].get("nmse"))
                own = [None if gain is None else 100 * gain for gain in gains(base, own)]
            found = Interval.of(own)
            yield None if found is None else found.mean

    def reliability(self, arm: Arm, task: str) -> tuple[list[float], list[float]]:
        """Mean predictions and shares that came true, over all seeds; bins of few targets are left out."""
        seeds = arm.summary.get(RELIABILITY, {}).get(task, [])
        predicted, positive = [], []
        for bins in zip(*seeds, strict=True):
            targets = sum(row["targets"] for row in bins)
            if targets >= FEW:
                predicted.append(sum(row["targets"] * (row["prediction"] or 0.0) for row in bins) / targets)
                positive.append(sum(row["positives"] for row in bins) / targets)
        return predicted, positive

    def validation(self, arm: Arm) -> list[float]:
        """The metric of the validation users after each epoch, mean over seeds; none where nobody validates."""
        courses = [
            [values.get(f"{self.kind}_all") for values in course] for course in arm.summary.get("validation", [])
        ]
        means = [Interval.of(values) for values in zip(*courses, strict=False)]
        return [mean.mean for mean in means if mean is not None]


def by_seed(summary: dict[str, Any]) -> dict[int, int]:
    """Where in an arm's lists each seed stands; earlier versions had seeds 0, 1, ... alone."""
    seeds = summary.get("seed") or range(len(summary["best_epoch"]))
    return {seed: place for place, seed in enumerate(seeds)}


def paired(one: dict[str, Any], other: dict[str, Any], name: str) -> tuple[list[Any], list[Any]]:
    """A metric's values of two arms, for the seeds that both have."""
    its, own = by_seed(one), by_seed(other)
    seeds = [seed for seed in its if seed in own] if name in one and name in other else []
    return [one[name][its[seed]] for seed in seeds], [other[name][own[seed]] for seed in seeds]


FEW = 50  # targets, below which a bucket says too little to be drawn


def named(values: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(values[:-1]), values[-1]] if len(values) > 1 else values)
