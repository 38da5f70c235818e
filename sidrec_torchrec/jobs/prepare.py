"""Splits event logs into training, validation and test sequences."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.format import DataConfig, open_events, open_users
from sidrec_torchrec.data.prepare import SEQUENCES, PrepareConfig, prepare
from sidrec_torchrec.data.unread import in_words, unread_events, unread_users
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import say, stage
from sidrec_torchrec.training.runs import open_run


@dataclass(frozen=True, kw_only=True)
class PrepareJobConfig(DataConfig):
    """What to split, and how.

    Args:
        data: folder of ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        out: folder for the sequences.
        protocol: which events train, validate and test.
    """

    out: Path
    protocol: PrepareConfig = field(default_factory=PrepareConfig)

    def files(self) -> list[Path]:
        """The files the sequences are made from."""
        return self.folder.files()


def main(config: PrepareJobConfig) -> dict[str, Any]:
    """Writes the sequences; one process works, the others wait. Returns counts by split, and what ``Prepared.met`` says.

    Raises:
        DataError: on bad data; names file, column and row.
        RunMismatchError: if ``out`` holds sequences of another protocol or other data.
    """
    with process_group(), open_run(config.out, config, inputs=config.files()) as run:
        return run.result or run.finish(on_first_process(lambda: _prepare(config)))


def _prepare(config: PrepareJobConfig) -> dict[str, Any]:
    for line in _unread(config):
        say(line)
    with stage("prepare sequences", None, show=True) as progress:
        prepared = prepare(config.folder, config.out / SEQUENCES, config.protocol)
        progress.advance(0, ", ".join(f"{s} {c['targets']:,} targets" for s, c in prepared.counts.items()))
    for name, met in prepared.met.items():
        if met["count"]:
            say(f"{name.replace('_', ' ')}: {met['count']:,} ({met['policy']})")
    return {**prepared.counts, "met": prepared.met}


def _unread(config: PrepareJobConfig) -> Iterator[str]:
    """A line for each file of which not all is read."""
    events, users = open_events(config.folder, config.protocol.tasks), open_users(config.folder)
    if unread := unread_events(events):
        yield f"{events.path}: {in_words(unread)}"
    if users is not None and (unread := unread_users(users, users.categorical)):
        yield f"{users.path}: {in_words(unread)}"
