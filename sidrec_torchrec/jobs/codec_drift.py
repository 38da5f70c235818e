"""Says how SIDs moved: between two codecs over the same items, or between two corpora under one codec."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sidrec_torchrec.codec.alphabet import format_stages
from sidrec_torchrec.codec.drift import digit_drift, prefix_drift
from sidrec_torchrec.codec.report import DigitUse
from sidrec_torchrec.data.ids import IdIndex
from sidrec_torchrec.data.sids import SIDFile, open_sids
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.runs import RESULT_FILE


@dataclass(frozen=True, kw_only=True)
class CodecDriftConfig(JobConfig):
    """What to compare.

    Args:
        old: folder encode-corpus wrote, or its ``sids.parquet``.
        new: another one.
        json: file for the report as JSON; not written if not given.
    """

    old: Path
    new: Path
    json: Path | None = None


def main(config: CodecDriftConfig) -> dict[str, Any]:
    """Prints the report and returns it.

    ``prefixes``: over the items both files hold, ``PrefixDrift`` by depth. ``digits``: if one codec made both, ``DigitDrift``
    by digit, over all items of each; else None, for the digits of two codecs mean different things. ``reconstruction``:
    by source, what each whole SID loses (relative squared error), if encode-corpus's own report lies beside both files.

    Memory: about 200 bytes an item, for SIDs of one word in both files; ids and words are held, and sorted.

    Raises:
        DataError: on files that are missing or broken, or have neither items nor their codec in common.
    """
    old, new = open_sids(config.old), open_sids(config.new)
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
    report = {
        "old": _describe(old),
        "new": _describe(new),
        "common_items": len(old_rows),
        "prefixes": [asdict(depth) for depth in prefixes],
        "digits": None if digits is None else [asdict(digit) for digit in digits],
        "reconstruction": _reconstructions(old, new),
    }
    if config.json is not None:
        write_json(config.json, report)
    _print(report)
    return report


def _use(file: SIDFile, words_NW: np.ndarray) -> DigitUse:
    use = DigitUse(file.spec)
    for first in range(0, len(words_NW), 1 << 16):
        use.update(file.spec.unpack(words_NW[first : first + (1 << 16)]))
    return use


def _describe(file: SIDFile) -> dict[str, Any]:
    return {
        "path": str(file.path),
        "items": file.num_items,
        "stages": format_stages(file.spec.stages),
        "fingerprint": file.spec.fingerprint,
    }


def _reconstructions(old: SIDFile, new: SIDFile) -> dict[str, dict[str, float]]:
    """Error of whole SIDs in both corpora, by source that both report."""
    before, after = _reconstruction(old), _reconstruction(new)
    return {source: {"old": before[source], "new": after[source]} for source in before if source in after}


def _reconstruction(file: SIDFile) -> dict[str, float]:
    path = file.path.parent / RESULT_FILE
    result = read_json(path) if path.exists() else {}
    if result.get("fingerprint") != file.spec.fingerprint:
        return {}
    return {source: errors[-1] for source, errors in result.get("reconstruction", {}).items()}


def _print(report: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 110))
    for name in ("old", "new"):
        file = report[name]
        console.print(
            f"{name}: {file['path']}: {file['items']:,} items, {file['stages']}, codec {file['fingerprint']}",
            highlight=False,
            soft_wrap=True,
        )
    if report["prefixes"]:
        console.print(_prefix_table(report))
    if report["digits"]:
        console.print(_digit_table(report["digits"]))
    if report["reconstruction"]:
        table = _table("Relative squared error of whole SIDs, each over its own corpus", "source", "old", "new")
        for source, errors in report["reconstruction"].items():
            table.add_row(source, f"{errors['old']:.4f}", f"{errors['new']:.4f}")
        console.print(table)


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
        table.add_column(column, justify="left" if column == "source" else "right")
    return table
