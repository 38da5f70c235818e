"""Proposes what the files and columns of a data folder are called, and writes it where every job finds it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.format import DataConfig, DataFolder, open_events
from sidrec_torchrec.data.propose import propose
from sidrec_torchrec.data.unread import unread_events
from sidrec_torchrec.files import write_json
from sidrec_torchrec.output import show
from sidrec_torchrec.training.progress import stage


@dataclass(frozen=True, kw_only=True)
class DataSchemaConfig(DataConfig):
    """What to look at.

    Args:
        data: the data folder.
        schema: what is known of its files and columns; the rest is proposed.
        out: JSON file to write; none given: ``schema.json`` in the data folder, which every job reads. Another one is named
            with ``--schema FILE``.
    """

    out: Path | None = None


def main(config: DataSchemaConfig) -> dict[str, Any]:
    """Prints, writes and returns the schema.

    Raises:
        DataError: if a file is missing or broken, or a column that is needed is not found; lists those there are.
    """
    with stage("look at the data", None, show=True, line=False):
        schema = propose(config.folder)
    path = config.out
    if path is None:
        path = DataFolder(config.data, schema).write_schema()
    else:
        write_json(path, schema.to_json())
    show(f"{path}: {json.dumps(schema.to_json(), indent=2)}")
    _print_candidates(DataFolder(config.data, schema))
    return schema.to_json()


def _print_candidates(data: DataFolder) -> None:
    """Columns that may be features, which only who knows the log can tell: what is known after the event must not be asked."""
    if not data.has("events"):
        return
    events = open_events(data)
    names = [name for name, why in unread_events(events).items() if not why.endswith("a pandas index")]
    if names:
        show(
            f"{events.path}: not read: {', '.join(names)}. Labels are named by --tasks (a number to predict as dwell:regression); what is known when a ranker is asked (a device, "
            "an hour) may be one of --event-features, what comes out afterwards (a dwell time) one of --history-features"
        )
