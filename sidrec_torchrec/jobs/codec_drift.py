"""Says how SIDs moved: between two codecs over the same items, two corpora under one codec, or a generation and those before."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sidrec_torchrec.codec.alphabet import format_stages
from sidrec_torchrec.codec.drift import digit_drift, prefix_drift
from sidrec_torchrec.codec.quality import qualities
from sidrec_torchrec.codec.report import DigitUse
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.sid_manifest import SIDS_FILE
from sidrec_torchrec.data.sids import SIDFile, SIDs, open_sids
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_object, write_json
from sidrec_torchrec.storage.urls import as_urls
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.progress import stage
from sidrec_torchrec.training.runs import RESULT_FILE


@dataclass(frozen=True, kw_only=True)
class CodecDriftConfig(JobConfig):
    """What to compare.

    Args:
        new: folder encode-corpus wrote, or the file of one generation.
        old: another one, to compare it with; none given: the last generation of ``new`` is compared with those before.
        json: file for the report as JSON; not written if not given.
    """

    new: Path
    old: Path | None = None
    json: Path | None = None


def main(config: CodecDriftConfig) -> dict[str, Any]:
    """Prints the report and returns it.

    ``prefixes``: over the items both files hold, ``PrefixDrift`` by depth. ``digits``: if one codec made both, ``DigitDrift``
    by digit, over all items of each; else None, for the digits of two codecs mean different things. ``reconstruction``:
    by source, what whole SIDs lose (relative squared error), where encode-corpus wrote a full report of all that is compared.
    ``quality``: of ``old`` and ``new``, or of ``new`` alone if there is no other: ``SIDQuality`` of ``all`` and of each of its
    ``generations``, with ``reconstruction`` as above.

    Memory: about 200 bytes an item, for SIDs of one word in both files; ids and words are held, and sorted.

    Raises:
        DataError: on files that are missing or broken, or have neither items nor their codec in common; or if there is but one
            generation, and nothing to compare it with.
    """
    report = _compare(config)
    if config.json is not None:
        write_json(config.json, report, sealed=True)
    _print(report)
    return report


@stage("drift", None, show=True, line=False)
def _compare(config: CodecDriftConfig) -> dict[str, Any]:
    new = open_sids(config.new)
    whole = {"new": new} if config.old is None else {"old": open_sids(config.old), "new": new}
    old, new = _split(new) if config.old is None else (whole["old"], new)
    old_ids, old_NW = old.read()
    new_ids, new_NW = new.read()
    row_N = IdIndex(new_ids).find(old_ids)
    old_rows = np.flatnonzero(row_N >= 0)
    new_rows = row_N[old_rows]
    one_codec = old.spec == new.spec
    if not one_codec and not len(old_rows):
        raise DataError(
            f"{old.path} and {new.path} have no item in common and were made by two codecs: there is nothing to compare; "
            "encode the same items with both codecs, or both corpora with one"
        )
    prefixes = prefix_drift(old.spec, old_NW[old_rows], new.spec, new_NW[new_rows]) if len(old_rows) else []
    digits = digit_drift(_use(old, old_NW), _use(new, new_NW)) if one_codec else None
    return {
        "old": _describe(old),
        "new": _describe(new),
        "common_items": len(old_rows),
        "prefixes": [asdict(depth) for depth in prefixes],
        "digits": None if digits is None else [asdict(digit) for digit in digits],
        "reconstruction": _reconstructions(old, new),
        "quality": {name: _quality(sids) for name, sids in whole.items()},
    }


def _split(sids: SIDs) -> tuple[SIDs, SIDs]:
    """All generations but the last, and the last."""
    *earlier, last = sids.generations
    if not earlier:
        raise DataError(
            f"{sids.path}: holds one generation; name --old to compare it with, or add one: encode-corpus --append"
        )
    path = earlier[0].path if len(earlier) == 1 else sids.path
    return SIDs(path, sids.spec, tuple(earlier)), SIDs(last.path, sids.spec, (last,))


def _use(sids: SIDs, words_NW: np.ndarray) -> DigitUse:
    use = DigitUse(sids.spec)
    for first in range(0, len(words_NW), 1 << 16):
        use.update(sids.spec.unpack(words_NW[first : first + (1 << 16)]))
    return use


def _describe(sids: SIDs) -> dict[str, Any]:
    return {
        "path": as_urls(str(sids.path)),
        "items": sids.num_items,
        "generations": len(sids.generations),
        "stages": format_stages(sids.spec.stages),
        "fingerprint": sids.spec.fingerprint,
    }


def _quality(sids: SIDs) -> dict[str, Any]:
    words = [np.concatenate([words_NW for _, words_NW in file.batches()]) for file in sids.generations]
    each, together = qualities(sids.spec, words)
    errors = [_reconstruction((file,)) for file in sids.generations]
    return {
        "all": asdict(together) | {"reconstruction": _reconstruction(sids.generations)},
        "generations": [asdict(one) | {"reconstruction": its} for one, its in zip(each, errors, strict=True)],
    }


def _reconstructions(old: SIDs, new: SIDs) -> dict[str, dict[str, float]]:
    """Error of whole SIDs in both corpora, by source that both report."""
    before, after = _reconstruction(old.generations), _reconstruction(new.generations)
    return {source: {"old": before[source], "new": after[source]} for source in before if source in after}


def _reconstruction(files: Sequence[SIDFile]) -> dict[str, float]:
    """Error of whole SIDs over all the items, by source that every file's report has."""
    reports = [_report(file) for file in files]
    errors = [report.get("reconstruction", {}) for report in reports]
    if len(files) == 1:
        return {source: its[-1] for source, its in errors[0].items()}
    shared = [source for source in errors[0] if all(source in report.get("counts", {}) for report in reports)]
    counts = {source: [report["counts"][source] for report in reports] for source in shared}
    return {
        source: sum(its[source][-1] * count for its, count in zip(errors, counts[source], strict=True))
        / sum(counts[source])
        for source in shared
    }


def _report(file: SIDFile) -> dict[str, Any]:
    """What encode-corpus reported of a generation; nothing where that is not known."""
    if file.generation is not None and file.generation.report:
        return file.generation.report
    path = file.path.parent / RESULT_FILE  # as earlier versions wrote it
    result = read_object(path) if path.exists() and file.path.name == SIDS_FILE else {}
    return result if result.get("fingerprint") == file.spec.fingerprint and "generation" not in result else {}


def _print(report: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 110))
    for name in ("old", "new"):
        file = report[name]
        console.print(
            f"{name}: {file['path']}: {file['items']:,} items, {file['stages']}, codec {file['fingerprint']}",
            highlight=False,
            soft_wrap=True,
        )
    console.print(*_quality_tables(report["quality"]))
    if report["prefixes"]:
        console.print(_prefix_table(report))
    if report["digits"]:
        console.print(_digit_table(report["digits"]))
    if report["reconstruction"]:
        table = _table("Relative squared error of whole SIDs, each over its own corpus", "source", "old", "new")
        for source, errors in report["reconstruction"].items():
            table.add_row(source, f"{errors['old']:.4f}", f"{errors['new']:.4f}")
        console.print(table)


def _quality_tables(quality: dict[str, dict[str, Any]]) -> list[Table]:
    title = "Quality of SIDs: unique: SIDs by items; colliding: with an item of the same or an earlier generation"
    columns = ("SIDs", "items", "unique", "colliding", "largest group", "Gini", "digits used")
    rows: dict[str, dict[str, Any]] = {}
    for name, its in quality.items():
        each = its["generations"] if len(its["generations"]) > 1 else []
        rows |= {f"{name}, generation {number}": one for number, one in enumerate(each)} | {f"{name}, all": its["all"]}
    table = _table(title, *columns)
    for label, one in rows.items():
        shares = (f"{one['unique']:.2%}", f"{one['colliding']:.2%}", f"{one['largest']:,}")
        table.add_row(label, f"{one['items']:,}", *shares, f"{one['gini']:.3f}", f"{one['used']:.1%}")
    sources = sorted({source for one in rows.values() for source in one["reconstruction"]})
    if len(rows) == len(quality) or not sources:
        return [table]
    errors = _table("Relative squared error of whole SIDs, by source", "SIDs", *sources)
    for label, one in rows.items():
        its = one["reconstruction"]
        errors.add_row(label, *(f"{its[source]:.4f}" if source in its else "-" for source in sources))
    return [table, errors]


def _prefix_table(report: dict[str, Any]) -> Table:
    title = f"Prefixes of the {report['common_items']:,} items in both; agreement: adjusted Rand index of who shares a prefix"
    table = _table(title, "digits, old", "digits, new", "bits", "changed", "agreement")
    for depth in report["prefixes"]:
        table.add_row(
            str(depth["old_digits"]),
            str(depth["new_digits"]),
            f"{depth['bits']:.1f}",
            "-" if depth["changed"] is None else f"{depth['changed']:.2%}",
            "-" if depth["agreement"] is None else f"{round(depth['agreement'], 3) + 0.0:.3f}",  # no -0.000
        )
    return table


def _digit_table(digits: list[dict[str, Any]]) -> Table:
    title = (
        "Digits over all items of each; divergence: Jensen-Shannon, bits; chance: of two samples of one distribution"
    )
    table = _table(
        title, "digit", "divergence", "chance", "entropy, old", "entropy, new", "newly used", "no longer used"
    )
    for number, digit in enumerate(digits, start=1):
        table.add_row(
            str(number),
            f"{digit['divergence']:.2g}",
            f"{digit['chance']:.2g}",
            f"{digit['old_entropy']:.3f}",
            f"{digit['new_entropy']:.3f}",
            f"{digit['newly_used']:,}",
            f"{digit['no_longer_used']:,}",
        )
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in ("source", "SIDs") else "right", no_wrap=column == "SIDs")
    return table
