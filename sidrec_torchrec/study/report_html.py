"""report.html: a comparison of arms as one page that needs no network."""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from sidrec_torchrec.files import atomic_path
from sidrec_torchrec.study.canvas import page_variables, swatch
from sidrec_torchrec.study.comparison import Comparison
from sidrec_torchrec.study.explorer import Explorer
from sidrec_torchrec.study.pictures import (
    bucket_pictures,
    byte_pictures,
    curve_pictures,
    difference_pictures,
    digit_pictures,
    gain_pictures,
    reliability_pictures,
)
from sidrec_torchrec.study.results import FEW, PARTS, Arm, Results, named
from sidrec_torchrec.study.tables import (
    bucket_tables,
    calibration_table,
    cost_table,
    difference_table,
    digit_table,
    result_table,
    setting_table,
    step_table,
)

_ASSETS = files("sidrec_torchrec.study") / "assets"
_ARM = (
    "An arm is one way of telling a ranker which item an event is about: by nothing, by the item's embeddings, by its semantic ID (SID), by a "
    "learned table. The ranker, its data and how it is tested are the same for all arms."
)
_COMMANDS = ("pipeline", "train-ranker", "evaluate", "report", "codec collisions")


def write_html(report: dict[str, Any], path: Path, explorer: Explorer | None = None) -> None:
    """Writes the page of a pipeline.

    Args:
        report: the content of ``report.json``.
        path: the file.
        explorer: SIDs to walk through.
    """
    title = "How much each item representation helps, and what it costs"
    made = [{"words": _made_words(report), "command": report["command"]}]
    _write(path, _parts(Results(report)) | {"title": title, "made": made, "explorer": explorer and _explored(explorer)})


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Writes the page of several runs side by side.

    Args:
        comparison: of the runs.
        path: the file.
    """
    results, found = Results(comparison.report), comparison.differences
    metric = results.kind.upper()
    tables = [difference_table(found, metric)] if found else []
    tables += [setting_table(comparison.settings, comparison.labels)] if comparison.settings else []
    parts = {
        "title": f"{len(comparison.labels)} runs side by side",
        "made": comparison.made,
        "warnings": comparison.warnings,
        "comparison": {
            "words": _comparison_words(comparison),
            "figures": [*difference_pictures(found, metric)],
            "tables": tables,
        },
    }
    _write(path, _parts(results) | parts)


def _write(path: Path, parts: dict[str, Any]) -> None:
    sections = {
        "what": "What is compared", "data": "Data", "differences": parts["comparison"] and "Differences",
        "results": "Results", "where": parts["bucket_tables"] and "Where the gain comes from",
        "training": parts["curves"] and "Training", "calibration": parts["calibration"] and "Calibration and order",
        "digits": parts["digits"] and "Digits", "sids": parts["explorer"] and "SIDs, digit by digit",
        "made": "How it was made",
    }  # fmt: skip
    contents = [(anchor, name) for anchor, name in sections.items() if name]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["prose"] = _prose
    page = environment.from_string(_asset("report.html")).render(**parts, contents=contents)
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _parts(results: Results) -> dict[str, Any]:
    """What the template shows of any report."""
    report = results.report
    tokenizers = report.get("tokenizer", {})
    return {
        "highlights": [*_highlights(results)],
        "warnings": [],
        "comparison": None,
        "explorer": None,
        "explained": [*_explained(results)],
        "arms": [_shown(arm) for arm in results.arms],
        "gaining": [_shown(arm) for arm in results.gaining or results.arms],
        "facts": _facts(results),
        "protocol": report["protocol"],
        "gains": [*gain_pictures(results)],
        "gains_words": _gains_words(results),
        "by_bytes": [*byte_pictures(results)],
        "by_bytes_words": _by_bytes_words(results),
        "table_words": _table_words(results),
        "results": result_table(results),
        "costs": cost_table(results),
        "buckets": [*bucket_pictures(results)],
        "buckets_words": _buckets_words(results),
        "bucket_tables": [*bucket_tables(results)],
        "over_seeds": ", mean over seeds with its 95% interval" if results.seeds > 1 else "",
        "curves": [*curve_pictures(results)],
        "curves_words": _curves_words(results),
        "calibration": calibration_table(results),
        "calibration_words": _calibration_words(results),
        "reliability": [*reliability_pictures(results)],
        "digits": [*digit_pictures(tokenizers)],
        "digit_table": digit_table(tokenizers),
        "commands": _COMMANDS,
        "steps": step_table(report.get("steps", {})),
        "versions": ", ".join(f"{name} {value}" for name, value in report["versions"].items()),
        "light": page_variables(is_dark=False),
        "dark": page_variables(is_dark=True),
        "css": Markup(_asset("report.css")),  # noqa: S704 - ours
    }


def _prose(text: str) -> Markup:
    """Text of the page, whose names stand in backticks."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _shown(arm: Arm) -> dict[str, Any]:
    return {"name": arm.name, "swatch": Markup(swatch(arm.look)), "words": arm.words}  # noqa: S704 - no text in it


def _highlights(results: Results) -> list[str]:
    """The best arm that condenses content or learns, on warm and on cold items, beside all of the content."""
    kind, end = next(iter(results.metrics.values()))
    lines = []
    for part, words in PARTS.items():
        name = f"{kind}_{part}{end}"
        able = [(gain.mean, gain, arm) for arm in results.gaining if not arm.is_bound and (gain := arm.gain(name))]
        if not able:
            continue
        _, gain, best = max(able, key=lambda one: one[0])
        line = f"On {words} `{best.name}` gains most: its {kind.upper()} is {gain.text('.1f')}% below that of {results.base_names}"
        share, bound = results.kept(best, name), results.bound_of(best)
        if share is not None and bound is not None:
            line += f", {share:.0%} of what `{bound.name}` gains, in {_bytes(best)} of a log per event where `{bound.name}` takes {_bytes(bound)}"
        lines.append(line + ".")
    return lines


def _bytes(arm: Arm) -> str:
    return f"{arm.summary['bytes_per_event_stored']:,.1f} bytes"


def _explained(results: Results) -> list[str]:
    base = results.base_names
    lines = [_ARM]
    if results.report["sequences"]["tasks"]:
        share = results.positives
        rate = f", here {share:.1%} of the test targets," if share is not None else ""
        lines.append(
            "NE (normalized entropy) is the logistic loss of a ranker's predictions over that of always predicting the share of "
            f"positives{rate} so that 1 is worth nothing, 0 is perfect and lower is better."
            + (
                f" The gain of an arm is by how many percent its NE is below that of {base}, which knows everything but the item."
                if base
                else ""
            )
        )
    if results.report["sequences"].get("regressions"):
        lines.append(
            "NMSE is the share of the squared errors of always predicting the training mean that is left: 1 is worth nothing, lower is better."
        )
    lines.append(
        "Warm items are those that training has; cold ones are new to the ranker, so that nothing but their content can be known."
    )
    return lines


def _facts(results: Results) -> list[tuple[str, str]]:
    report, seeds = results.report, (f"{results.seeds}", "seed" if results.seeds == 1 else "seeds of each ranker")
    if not results.is_of_one_data:
        return [seeds]
    summary, counts = report.get("data", {}).get("summary", {}), report["sequences"].get("counts", {})
    facts = [(f"{summary[name]:,}", name) for name in ("users", "items", "events") if summary.get(name) is not None]
    if not summary and "num_items" in report["sequences"]:
        facts.append((f"{report['sequences']['num_items']:,}", "items"))
    if "train" in counts:
        facts.append((f"{counts['train']['targets']:,}", "training targets"))
    targets: dict[str, float] = next((arm.summary.get("targets", {}) for arm in results.arms), {})
    end = next(iter(results.metrics.values()))[1] or f"_{results.tasks[0]}" * (len(results.tasks) > 1)
    for part in PARTS:
        if (count := targets.get(f"{part}{end}")) is not None:
            facts.append((f"{count:,.0f}", f"test targets on {part} items"))
    if results.positives is not None:
        facts.append((f"{results.positives:.1%}", "of the test targets are positive"))
    facts += [
        (f"{source['dim']}", f"values of the embedding {name}") for name, source in summary.get("sources", {}).items()
    ]
    return [*facts, seeds]


def _gains_words(results: Results) -> str:
    words = "One seed: nothing says how much of a difference is chance."
    if results.seeds > 1:
        words = (
            f"Means over {results.seeds} seeds of the ranker; bars and ± are 95% intervals (Student's). Gains are taken seed by seed, so what a seed does to "
            "all arms alike is no part of them; tokenizers have one seed."
        )
    if len(results.bounds) == 1:
        words += f" The line `{results.bounds[0].name}` is what the embeddings themselves gain as they come."
    if results.oracle is not None:
        words += (
            f" The line `true probabilities` is the best that can be had at all: this corpus is synthetic, and its own probabilities have NE {results.oracle:.3f} "
            "(over all events; the test events may differ a little)."
        )
    return words


def _by_bytes_words(results: Results) -> str:
    absent = [*dict.fromkeys(f"`{arm.kind}`" for arm in results.arms if not arm.summary["bytes_per_event_stored"])]
    words = "What an event's item costs in a Parquet log (zstd), on an axis in which each step is as many times more."
    return words + (f" Not shown: {named(absent)}, which stores nothing." if absent else "")


def _table_words(results: Results) -> str:
    over = "± is half of the 95% interval over seeds. " if results.seeds > 1 else ""
    return (
        f"{over}Stored in a Parquet log, compressed with zstd; the batch is TorchRec's KeyedJaggedTensor; tables are learned rows and constants that "
        "the item's representation needs in the model."
    )


def _buckets_words(results: Results) -> str:
    per = f"Each bucket's gain is relative to {results.base_names} in the same bucket" if results.gaining else "Means"
    return f"Test targets, sorted four ways. {per}, the mean over seeds. Buckets of fewer than {FEW} targets are not drawn."


def _curves_words(results: Results) -> str:
    best = [
        f"`{arm.name}` {named([str(epoch) for epoch in sorted(set(arm.summary['best_epoch']))])}"
        for arm in results.arms
    ]
    return f"After each epoch a ranker is tested on users left out of training, and the best epoch is kept: {'; '.join(best)}."


def _calibration_words(results: Results) -> str:
    words = "Calibration is the mean prediction over the share that is positive: 1 is right, above it the ranker promises too much. AUC is "
    words += "the share of pairs of a positive and a negative that the ranker puts in the right order: 0.5 is chance, 1 is perfect."
    if any(arm.summary.get("reliability") for arm in results.arms):
        words += f" The curves say the same by what was predicted; bins of fewer than {FEW} targets are left out."
    return words


def _comparison_words(comparison: Comparison) -> str:
    if not comparison.differences:
        return "No two of these runs are subtracted from each other."
    return (
        "Each arm beside another run's, seed by seed, on the same test targets; ± is half of the 95% interval over seeds (Student's). Where it "
        "does not reach 0, the difference is more than what seeds do."
    )


def _made_words(report: dict[str, Any]) -> str:
    hardware = ", ".join(f"{name} {value}" for name, value in report["hardware"].items() if value not in (None, []))
    processes = report["processes"]
    return f"{report['seconds']:,.0f} s in all, by {processes} process{'es' * (processes > 1)} ({hardware})."


def _explored(explorer: Explorer) -> dict[str, Any]:
    count = len(explorer.ids)
    which = (
        f"all {count:,} items"
        if count == explorer.items
        else f"{count:,} of the {explorer.items:,} items, drawn at random"
    )
    columns = f", with what {named([f'`{name}`' for name in explorer.columns])} say of them" if explorer.columns else ""
    # "</script>" in a text would end the element
    text = json.dumps(explorer.to_json(), ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return {
        "words": (
            f"A tree of {which}{columns}. Items whose SIDs begin alike are alike: choose a digit after another, from coarse to fine, down to the item. "
            "Digits are numbered as they are stored: of a trit 0, 1 and 2."
        ),
        "names": [*explorer.digits],
        "json": Markup(text),  # noqa: S704 - its "<" are escaped
        "script": Markup(_asset("explorer.js")),  # noqa: S704 - ours
    }
