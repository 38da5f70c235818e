"""The pictures of a report's page, each with its title and what its axes say."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup

from sidrec_torchrec.data.tasks import DEFAULT_TASKS
from sidrec_torchrec.ranker.breakdown import TABLES
from sidrec_torchrec.study.canvas import Draw, inline_svg
from sidrec_torchrec.study.comparison import Difference
from sidrec_torchrec.study.figures import (
    Curve,
    Dot,
    draw_by_bucket,
    draw_by_bytes,
    draw_curves,
    draw_digits,
    draw_dots,
    draw_reconstruction,
    draw_reliability,
)
from sidrec_torchrec.study.results import FEW, PARTS, Results

_MOST_LETTERS = 18  # of a name in a picture
_BUCKETS = {  # what each table answers, and its axis
    "item_training_events": ("By popularity of the item", "training events on the item"),
    "item_age": ("By age of the item", "time since the item's first event"),
    "history_length": ("By length of the history", "earlier events that the ranker reads"),
    "model_age": ("By age of the model", "time since the last training event"),
}


@dataclass(frozen=True)
class Picture:
    """A figure of the page.

    Args:
        title: in a few words.
        caption: what is drawn, with units.
        svg: the picture.
    """

    title: str
    caption: str
    svg: Markup


def picture(title: str, caption: str, draw: Draw, *, height: float = 3.1, **labels: str) -> Picture:
    """Draws one."""
    svg = inline_svg(draw, f"{title}: {caption}".replace("`", ""), labels=labels, height=height)
    return Picture(title, caption, Markup(svg))  # noqa: S704 - what is text in it is escaped


def gain_pictures(results: Results) -> Iterator[Picture]:
    """Warm and cold: what each arm gains, beside all of the content, and the true probabilities where they are known."""
    kind, end = next(iter(results.metrics.values()))
    for part, words in PARTS.items():
        name = f"{kind}_{part}{end}"
        gains = {arm.name: arm.gain(name) for arm in results.gaining}
        dots = [
            Dot(_fitted(arm.name), arm.look, gain) for arm in results.gaining if (gain := gains[arm.name]) is not None
        ]
        bounds = results.bounds if len(results.bounds) == 1 else []
        lines = [(_fitted(bound.name), own.mean) for bound in bounds if (own := gains.get(bound.name))]
        base = next((own for arm in results.arms if arm.is_base and (own := arm.metric(name))), None)
        if results.oracle is not None and base is not None:
            lines.append(("true probabilities", 100 * (1 - results.oracle / base.mean)))
        if dots:
            caption = f"{kind.upper()} gain over {results.base_names}, %; higher is better"
            draw = partial(draw_dots, dots=dots, format_spec="+.1f", lines=lines)
            yield picture(_capital(words), caption, draw, height=_height(dots))


def byte_pictures(results: Results) -> Iterator[Picture]:
    """Warm and cold: gains against what an event costs in a log."""
    kind, end = next(iter(results.metrics.values()))
    for part, words in PARTS.items():
        dots = [
            Dot(_fitted(arm.name), arm.look, gain, arm.summary["bytes_per_event_stored"])
            for arm in results.gaining
            if (gain := arm.gain(f"{kind}_{part}{end}")) is not None and arm.summary["bytes_per_event_stored"] > 0
        ]
        if dots:
            caption = f"{kind.upper()} gain over {results.base_names}, %, against bytes of an event's item in a compressed log"
            yield picture(
                _capital(words),
                caption,
                partial(draw_by_bytes, dots=dots),
                height=3.6,
                xlabel="bytes per event, stored",
            )


def bucket_pictures(results: Results) -> Iterator[Picture]:
    """For each way to sort test targets, and each task: what arms gain by bucket."""
    for table, (title, axis) in _BUCKETS.items():
        for task in results.tasks:
            rows_of = results.rows(table, task)
            shown = [arm for arm in results.gaining or results.arms if arm.name in rows_of]
            if not shown:
                continue
            rows = rows_of[shown[0].name]
            places = [place for place, row in enumerate(rows) if row["targets"] >= FEW]
            if len(places) < 2:
                continue
            curves = []
            for arm in shown:
                values = [*results.bucket_values(arm, table, task)]
                known = [(x, y) for x, y in enumerate(values[place] for place in places) if y is not None]
                curves.append(Curve(arm.look, [x for x, _ in known], [y for _, y in known]))
            kind = "NMSE" if "nmse" in rows[0] else "NE"
            what = f"{kind} gain over {results.base_names}, %" if results.gaining else f"{kind}; lower is better"
            draw = partial(draw_by_bucket, curves=curves, buckets=[rows[place]["bucket"] for place in places])
            yield picture(title + _of(task), what, draw, xlabel=axis)


def curve_pictures(results: Results) -> Iterator[Picture]:
    """The validation users' NE after each epoch."""
    curves = [Curve(arm.look, range(1, len(y) + 1), y) for arm in results.arms if (y := results.validation(arm))]
    if curves:
        what = "the squared error that is left of" if results.kind == "nmse" else "normalized entropy of"
        yield picture(
            f"{results.kind.upper()} by epoch",
            f"{what} users left out of training, mean over seeds; lower is better",
            partial(draw_curves, curves=curves),
            xlabel="epoch (pass over the training data)",
        )


def reliability_pictures(results: Results) -> Iterator[Picture]:
    """Of each task, what came true of what was predicted."""
    for task in results.report["sequences"]["tasks"]:
        curves = [Curve(arm.look, *own) for arm in results.arms if (own := results.reliability(arm, task))[0]]
        if curves:
            yield picture(
                f"Reliability{_of(task)}",
                "share of positives among test targets against the mean prediction; on the diagonal both are equal",
                partial(draw_reliability, curves=curves),
                height=3.8,
                xlabel="predicted",
                ylabel="came true",
            )


def digit_pictures(tokenizers: dict[str, Any]) -> Iterator[Picture]:
    """What digits say, and what prefixes of SIDs keep."""
    for name, tokenizer in tokenizers.items():
        corpus = tokenizer["corpus"]
        if most := tokenizer.get("digit_bits"):
            draw = partial(draw_digits, bits=corpus["digits"]["entropy"], most=most)
            caption = "entropy of each digit over the items, bits; light: the most it could be"
            yield picture(f"Tokenizer {name}", caption, draw, height=2.2, xlabel="digit, from coarse to fine")
    curves = {
        f"{source}, by {name}": ([corpus["bits"] * depth / corpus["depths"][-1] for depth in corpus["depths"]], errors)
        for name, tokenizer in tokenizers.items()
        for corpus in [tokenizer["corpus"]]
        for source, errors in corpus.get("reconstruction", {}).items()
    }
    if curves:
        yield picture(
            "What a prefix of the SID keeps",
            "squared error of each source when decoded from the first digits alone, relative to guessing the mean (1)",
            partial(draw_reconstruction, curves=curves),
            xlabel="bits of the prefix",
        )


def difference_pictures(differences: Sequence[Difference], metric: str) -> Iterator[Picture]:
    """Warm and cold: differences between runs."""
    for part, words in PARTS.items():
        dots = [Dot(_fitted(one.name), one.look, one.values[part]) for one in differences if part in one.values]
        if dots:
            draw = partial(draw_dots, dots=dots, format_spec="+.4f", lines=[("equal", 0.0)])
            caption = f"difference of {metric}, paired by seed; below 0 is better"
            yield picture(_capital(words), caption, draw, height=_height(dots))


def _height(dots: Sequence[Dot]) -> float:
    """Inches of a picture of a row per dot."""
    return 1.1 + (0.42 if any("\n" in dot.name for dot in dots) else 0.3) * len(dots)


def _fitted(name: str) -> str:
    """A name beside a picture: a long one in two lines, the arm's and the run's, each cut in its middle."""
    if len(name) <= _MOST_LETTERS:
        return name
    lines = name.split(", ", 1)
    half = _MOST_LETTERS // 2
    return "\n".join(line if len(line) <= _MOST_LETTERS else f"{line[:half]}…{line[-half:]}" for line in lines)


def bucket_title(table: str, task: str) -> str:
    """Of a table of buckets."""
    return _capital(TABLES[table].title) + _of(task)


def _of(task: str) -> str:
    return "" if task == DEFAULT_TASKS[0] else f"; {task}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
