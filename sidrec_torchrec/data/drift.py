"""Has what a ranker reads moved? What users and test targets were like when it was trained, against what they are like now.

Preparing counts, in ``prepared.json`` as ``profile``: a few numbers for each value of a user feature, and for test targets. Two
such counts are compared. Of both, test targets are looked at: what training had is, by the protocol, of another kind.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sidrec_torchrec.data.features import Feature
from sidrec_torchrec.data.format import Users
from sidrec_torchrec.data.prepared import Prepared
from sidrec_torchrec.data.sequence_files import open_sequences
from sidrec_torchrec.data.sequences import Sequence
from sidrec_torchrec.data.tasks import UNKNOWN, label_of
from sidrec_torchrec.data.user_lists import list_classes
from sidrec_torchrec.files import write_json
from sidrec_torchrec.output import Amount, output, warn

DRIFT_FILE = "drift.json"

MOST_PSI = 0.2
"""A stability index above this is warned of: the usual threshold of credit scoring, where below 0.1 counts as stable."""

MOST_UNKNOWN = 0.05
"""A share of unknown values above this is warned of."""

_DAY = 86_400
_HISTORY_BUCKETS = 64  # 0 events; then 2^(b - 1) to 2^b - 1


def feature_counts(users: Users | None, features: tuple[Feature, ...]) -> dict[str, dict[str, Any]]:
    """By user feature how many rows of the user file have each value.

    Returns:
        ``counts``, of the codes 1, 2, ...; ``unknown``, of other values; ``missing``, of nulls. Of lists, how many have each value
        among others; ``missing``, of nulls and empty ones.
    """
    counts = {feature.name: np.zeros(feature.size, np.int64) for feature in features}
    missing = dict.fromkeys(counts, 0)
    for batch in users.batches(columns=tuple(counts)) if users is not None and features else ():
        for feature in features:
            column = batch.columns[feature.name]
            if feature.is_list:
                row_V, class_V = list_classes(feature, column)
                missing[feature.name] += (empty := len(column) - len(np.unique(row_V)))
                code_N = np.append(class_V + 1, np.zeros(empty, np.int64))
            else:
                missing[feature.name] += column.null_count
                code_N = feature.encode(column)
            counts[feature.name] += np.bincount(code_N, minlength=feature.size)
    return {
        name: {"counts": c[1:].tolist(), "unknown": int(c[0]) - missing[name], "missing": missing[name]}
        for name, c in counts.items()
    }


def target_counts(
    path: Path,
    tasks: tuple[str, ...],
    training_I: np.ndarray,
    features: tuple[Feature, ...] = (),
    regressions: list[str] | None = None,
) -> dict[str, Any]:
    """What the targets of a split are like; sampled negatives are left out. Holds a row group, and the days.

    Args:
        path: its folder.
        tasks: names of the labels.
        training_I: how many training events each item has.
        features: of the log's events, as sequences have them.
        regressions: names of the numbers to be predicted.

    Returns:
        ``targets``; ``without_training_events``, those on items that have none; ``history_lengths``, of how many targets the user
        had 0, 1, 2 to 3, 4 to 7, ... events before; ``history_events``, those events in all; ``labels``, by task positives and
        known labels; ``days``, from the first target's to the last's, both included. If there are features, ``features``: by name how many have each code. If
        there are regressions, ``values``: by name the sum of known values, and how many there are.
    """
    codes = {feature.name: np.zeros(feature.size, np.int64) for feature in features}
    untrained = events = 0
    history_B = np.zeros(_HISTORY_BUCKETS, np.int64)
    labels_K2 = np.zeros((len(tasks), 2), np.int64)
    values_R2 = np.zeros((len(regressions or []), 2))
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for rows in _row_groups(path):
        targets = [row.targets for row in rows]
        item_T, order_T, action_T, time_T, visible_T = (
            np.concatenate([getattr(row, name)[its] for row, its in zip(rows, targets, strict=True)])
            for name in ("item", "order", "action", "timestamp", "visible")
        )
        real = np.flatnonzero(visible_T & (item_T >= 0))
        if not len(real):
            continue
        untrained += int((training_I[item_T[real]] == 0).sum())
        history_B += np.bincount(np.frexp(order_T[real])[1], minlength=_HISTORY_BUCKETS)
        if codes:
            code_TF = np.concatenate([row.features[its] for row, its in zip(rows, targets, strict=True)])[real]
            for f, counts in enumerate(codes.values()):
                counts += np.bincount(code_TF[:, f], minlength=len(counts))
        events += int(order_T[real].sum(dtype=np.int64))
        for k in range(len(tasks)):
            label_T = label_of(action_T[real], k)
            labels_K2[k] += (label_T == 1).sum(), (label_T != UNKNOWN).sum()
        if regressions:
            value_TR = np.concatenate([row.values[row.targets] for row in rows])[real].astype(np.float64)
            values_R2 += np.stack([np.nansum(value_TR, axis=0), (~np.isnan(value_TR)).sum(0)], axis=1)
        first, last = min(first, int(time_T[real].min())), max(last, int(time_T[real].max()))
    num_targets = int(history_B.sum())
    return {
        "targets": num_targets,
        "without_training_events": untrained,
        "history_lengths": np.trim_zeros(history_B, "b").tolist(),
        "history_events": events,
        "labels": {task: counts_2.tolist() for task, counts_2 in zip(tasks, labels_K2, strict=True)},
        "days": last // _DAY - first // _DAY + 1 if num_targets else 0,
        **({"features": {name: counts.tolist() for name, counts in codes.items()}} if codes else {}),
        **({"values": dict(zip(regressions, values_R2.tolist(), strict=True))} if regressions else {}),
    }


def stability_index(then: Any, now: Any) -> float:
    """The population stability index (PSI) of two counts over the same K values.

    With counts a of A in all and b of B in all, and shares p_i = (a_i + 1/2) / (A + K/2) and q_i = (b_i + 1/2) / (B + K/2)::

        PSI = sum_i (q_i - p_i) ln(q_i / p_i)

    0 where the shares are equal; the halves keep it finite where a value occurs in one alone. Values that occur in neither count
    for nothing and are left out of K. Two samples of one distribution give about (K - 1)(1/A + 1/B), so that small ones differ by
    chance.

    Args:
        then: integers [K].
        now: integers [K]; the shorter of the two is filled up with zeros.
    """
    width = max(len(then), len(now))
    a_K, b_K = (np.pad(np.asarray(x, np.float64), (0, width - len(x))) for x in (then, now))
    occurs_K = (a_K + b_K) > 0
    a_K, b_K = a_K[occurs_K] + 0.5, b_K[occurs_K] + 0.5
    p_K, q_K = a_K / a_K.sum(), b_K / b_K.sum()
    return float(((q_K - p_K) * np.log(q_K / p_K)).sum())


def drift(own: Prepared, given: Prepared) -> dict[str, Any]:
    """How the data of ``given`` differ from those of ``own``.

    Args:
        own: what a ranker was trained on.
        given: prepared like it, and its training events those of the ranker: see ``data.seen_by``.

    Returns:
        JSON. ``features``: by user feature ``unknown``, ``missing`` (shares of users) and ``psi``, over known values, unknown and
        missing. Of test targets ``event_features``, by feature ``unknown`` (share of code 0, missing values among them) and ``psi``,
        over codes; ``without_training_events`` (share), ``history_length`` (mean, with ``psi`` over powers of
        two), ``label_rate`` by task, ``value_mean`` by task of regression, if there is any, and ``targets_per_day``. Each share, rate or mean is [then, now]; null where there is
        nothing to take it of. ``warnings``: in words, what is over ``MOST_PSI`` or ``MOST_UNKNOWN``.
    """
    then, now = own.profile, given.profile
    of_log = given.features.of_log
    regressions = [own.name for own in given.regressions]
    targets = (
        then["test"],
        target_counts(given.path("test"), given.tasks, given.training_events(), of_log, regressions),
    )
    features = {
        name: _feature_drift(counts, now["features"][name])
        for name, counts in then["features"].items()
        if name in now["features"]
    }
    report = {
        "features": features,
        "event_features": {
            name: {
                "unknown": [_share(t["features"][name][0], t["targets"]) for t in targets],
                "psi": stability_index(*(t["features"][name] for t in targets)),
            }
            for name in given.features.columns
        },
        "without_training_events": [_share(t["without_training_events"], t["targets"]) for t in targets],
        "history_length": {
            "mean": [_share(t["history_events"], t["targets"]) for t in targets],
            "psi": stability_index(*(t["history_lengths"] for t in targets)),
        },
        "label_rate": {task: [_share(*t["labels"][task]) for t in targets] for task in given.tasks},
        **(
            {"value_mean": {name: [_share(*t["values"][name]) for t in targets] for name in regressions}}
            if regressions
            else {}
        ),
        "targets_per_day": [_share(t["targets"], t["days"]) for t in targets],
    }
    return report | {"warnings": _warnings(report)}


def report_drift(report: dict[str, Any], out: Path | None) -> None:
    """Prints the table and the warnings of what ``drift`` found; with a folder, writes it there as ``drift.json``."""
    if out is not None:
        write_json(out / DRIFT_FILE, report, sealed=True)
    if output().amount >= Amount.NORMAL and not output().is_json:
        Console(stderr=True).print(drift_table(report))
    for line in report["warnings"]:
        warn(line)


def drift_table(report: Mapping[str, Any]) -> Table:
    """What ``drift`` found, to print."""
    table = Table(title="drift", title_justify="left")
    for heading in ("", "then", "now", "PSI"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, feature in report["features"].items():
        table.add_row(f"{name}: unknown", *map(_percent, feature["unknown"]), f"{feature['psi']:.3f}")
        table.add_row(f"{name}: missing", *map(_percent, feature["missing"]), "")
    for name, feature in report["event_features"].items():
        table.add_row(f"{name}: unknown or missing", *map(_percent, feature["unknown"]), f"{feature['psi']:.3f}")
    table.add_row("targets without training events", *map(_percent, report["without_training_events"]), "")
    history = report["history_length"]
    table.add_row("events before a target, mean", *map(_number, history["mean"]), f"{history['psi']:.3f}")
    for task, rate in report["label_rate"].items():
        table.add_row(f"{task} rate", *map(_percent, rate), "")
    for task, mean in report.get("value_mean", {}).items():
        table.add_row(f"{task}, mean", *map(_number, mean), "")
    table.add_row("targets a day", *map(_number, report["targets_per_day"]), "")
    return table


def _feature_drift(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    both = [np.array([*counts["counts"], counts["unknown"], counts["missing"]]) for counts in (then, now)]
    return {
        "unknown": [_share(int(x[-2]), int(x.sum())) for x in both],
        "missing": [_share(int(x[-1]), int(x.sum())) for x in both],
        "psi": stability_index(*both),
    }


def _warnings(report: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, feature in report["features"].items():
        if (feature["unknown"][1] or 0) > MOST_UNKNOWN:
            lines.append(
                f"user feature '{name}': {feature['unknown'][1]:.1%} of the users' values are ones that the ranker does not know, more than {MOST_UNKNOWN:.0%}"
            )
    for name, feature in report["event_features"].items():
        had, has = (share or 0 for share in feature["unknown"])
        if has > had + MOST_UNKNOWN:
            lines.append(
                f"event feature '{name}': {has:.1%} of the targets have no value that the ranker knows; when it was trained, {had:.1%}"
            )
    indices = {f"user feature '{name}'": feature["psi"] for name, feature in report["features"].items()}
    indices |= {f"event feature '{name}'": feature["psi"] for name, feature in report["event_features"].items()}
    indices["length of history"] = report["history_length"]["psi"]
    return lines + [
        f"{what}: PSI {psi:.3f}, above {MOST_PSI}: its distribution has moved"
        for what, psi in indices.items()
        if psi > MOST_PSI
    ]


def _row_groups(path: Path) -> Iterator[list[Sequence]]:
    with open_sequences(path) as files:
        for group in range(files.num_groups):
            yield files.rows(group)


def _share(part: float, of: float) -> float | None:
    return part / of if of else None


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
