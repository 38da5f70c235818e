"""Says which items share a SID: how many by prefix depth, the largest groups, and whether their content differs at all."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from sidrec_torchrec.codec.report import PrefixGroups
from sidrec_torchrec.data.ids import IdIndex, shown
from sidrec_torchrec.data.items import Items, open_items
from sidrec_torchrec.data.sids import SIDs, open_sids
from sidrec_torchrec.errors import DataError, check_at_least
from sidrec_torchrec.files import write_json
from sidrec_torchrec.storage.urls import as_urls
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.progress import stage


@dataclass(frozen=True, kw_only=True)
class CodecCollisionsConfig(JobConfig):
    """What to look at.

    Args:
        sids: folder encode-corpus wrote, or the file of one generation.
        items: data folder of the same items, or its ``items.parquet``; then the report shows their columns, and counts
            those whose content is the same.
        column: categorical columns of the items to show (text, numbers, lists of them); all if none is named.
        groups: how many of the largest groups to show.
        members: how many items of each.
        json: file for the report as JSON; not written if not given.

    Raises:
        ValueError: on negative numbers, or columns without items.
    """

    sids: Path
    items: Path | None = None
    column: tuple[str, ...] = ()
    groups: int = 10
    members: int = 5
    json: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "groups")
        check_at_least(self, 1, "members")
        if self.column and self.items is None:
            raise ValueError("column names columns of the items; give items too")


def main(config: CodecCollisionsConfig) -> dict[str, Any]:
    """Prints the report and returns it.

    ``prefixes``: ``PrefixUse`` by depth, the last of which is the whole SID. ``groups``: the largest groups of items with
    one SID: its ``digits``, ``size``, and the first ``members``, each with ``item_id`` and its columns. ``duplicates``: of
    the items that share a SID, those whose every source equals that of another in their group, bit by bit: no codec can
    tell them apart; None without ``items``, or where they have no sources.

    Memory: less than 100 bytes an item for SIDs of one word, which are held and sorted; the items are read in batches.

    Raises:
        DataError: on files that are missing or broken, an unknown column, or items that are not those of the SIDs.
    """
    report = _report(config)
    if config.json is not None:
        write_json(config.json, report, sealed=True)
    _print(report)
    return report


@stage("collisions", None, show=True, line=False)
def _report(config: CodecCollisionsConfig) -> dict[str, Any]:
    sids = open_sids(config.sids)
    items = None if config.items is None else open_items(config.items, targets=config.column or None)
    item_ids, words_NW = sids.read()
    groups = PrefixGroups.of(sids.spec, words_NW)
    largest = list(_largest(sids, words_NW, groups, config.groups))
    shown = [rows[: config.members] for rows, _ in largest]
    columns = _columns(items, item_ids, np.concatenate([np.empty(0, np.int64), *shown])) if items else {}
    return {
        "path": as_urls(str(sids.path)),
        "items": sids.num_items,
        "bits": sids.spec.bits,
        "prefixes": groups.result(),
        "duplicates": None if items is None else _duplicates(items, sids, item_ids, groups),
        "groups": [
            {
                "digits": digits,
                "size": len(rows),
                "members": [
                    {"item_id": item_ids[row].as_py()} | columns.get(row, {}) for row in rows[: config.members]
                ],
            }
            for rows, digits in largest
        ],
    }


def _largest(
    sids: SIDs, words_NW: np.ndarray, groups: PrefixGroups, count: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Rows and digits of the largest groups of one SID, by falling size."""
    depth = sids.spec.num_digits
    starts_G, sizes_G = groups.starts(depth), groups.sizes(depth)
    for group in np.argsort(-sizes_G, kind="stable")[:count]:
        if sizes_G[group] > 1:
            rows = groups.order_N[starts_G[group] : starts_G[group] + sizes_G[group]]
            yield rows, sids.spec.unpack(words_NW[rows[:1]])[0].tolist()


def _columns(items: Items, item_ids: pa.Array, rows: np.ndarray) -> dict[int, dict[str, Any]]:
    """By row of the SID file, the item's columns; those of ``rows`` alone."""
    wanted = IdIndex(item_ids.take(pa.array(rows)))
    found: dict[int, dict[str, Any]] = {}
    for batch in items.batches(sources=()):
        which_N = wanted.find(batch.item_ids)
        for place in np.flatnonzero(which_N >= 0):
            values = {name: column[int(place)].as_py() for name, column in batch.targets.items()}
            found[int(rows[which_N[place]])] = values
    return found


def _duplicates(items: Items, sids: SIDs, item_ids: pa.Array, groups: PrefixGroups) -> int | None:
    """Of items that share a SID, how many have the same sources as another in their group; by a 64-bit hash of each."""
    sizes_G, label_N = groups.sizes(groups.spec.num_digits), groups.labels(groups.spec.num_digits)
    colliding = np.flatnonzero(sizes_G[label_N] > 1)
    ids = item_ids.take(pa.array(colliding))
    index = IdIndex(ids)
    content, found = np.zeros(len(ids), np.uint64), np.zeros(len(ids), bool)
    for batch in items.batches(targets=()):
        place_N = index.find(batch.item_ids)
        known_N = place_N >= 0
        for row in np.flatnonzero(known_N):
            digest = hashlib.blake2b(digest_size=8)
            for x_ND in batch.sources.values():
                digest.update(x_ND[row].tobytes())
            content[place_N[row]] = int.from_bytes(digest.digest(), "little")
        found[place_N[known_N]] = True
    if not found.all() and len(sids.generations) == 1:  # published SIDs outlast their items
        raise DataError(
            f"{items.path}: no item_id {shown(ids, int(np.argmin(found)))}, which has a SID in {sids.path}; give the items that were "
            "encoded"
        )
    if not items.source_dims:
        return None
    _, counts = np.unique(np.stack([label_N[colliding].astype(np.uint64), content]), axis=1, return_counts=True)
    return int(counts[counts > 1].sum())


def _print(report: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 110))
    table = Table(title=f"{report['path']}: {report['items']:,} items by their first digits", title_justify="left")
    for column in ("digits", "prefixes", "entropy, bits", "items that share theirs", "largest group"):
        table.add_column(column, justify="right")
    for prefix in report["prefixes"]:
        table.add_row(
            str(prefix["digits"]),
            f"{prefix['distinct']:,}",
            f"{prefix['entropy']:.2f}",
            f"{prefix['shared']:,}",
            f"{prefix['largest']:,}",
        )
    console.print(table)
    shared = report["prefixes"][-1]["shared"]
    summary = f"{shared:,} of {report['items']:,} items share their SID with another"
    if report["duplicates"] is not None:
        summary += (
            f"; {report['duplicates']:,} of them have exactly the content of another, so no codec tells them apart"
        )
    console.print(summary, highlight=False, soft_wrap=True)
    for group in report["groups"]:
        digits = " ".join(map(str, group["digits"]))
        console.print(f"\n{group['size']:,} items of SID {digits}", highlight=False, soft_wrap=True)
        console.print(_group_table(group))


def _group_table(group: dict[str, Any]) -> Table:
    table = Table()
    names = list(group["members"][0])
    for name in names:
        table.add_column(name, justify="right" if name == "item_id" else "left", max_width=40)
    for member in group["members"]:
        table.add_row(*(_text(member[name]) for name in names))
    if group["size"] > len(group["members"]):
        table.add_row("...")
    return table


def _text(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
    return text.replace("[", r"\[")  # rich would read it as markup
