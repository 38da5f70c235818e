"""Splits event logs into training, validation and test sequences."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sidrec_torchrec.data.drift import drift, report_drift
from sidrec_torchrec.data.format import DataConfig, DataFolder, open_events, open_users
from sidrec_torchrec.data.like import like_config, like_folder, prepared_of
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import PREPARED_FILE, SEQUENCES, Prepared, open_prepared
from sidrec_torchrec.data.seen_by import seen_by
from sidrec_torchrec.data.unread import in_words, unread_events, unread_users
from sidrec_torchrec.engines.base import ENGINES, check_engine
from sidrec_torchrec.files import remove, sha256_of
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.storage.mirror import BEGUN
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import say, stage
from sidrec_torchrec.training.runs import CONFIG_FILE, open_run


@dataclass(frozen=True, kw_only=True)
class PrepareJobConfig(DataConfig):
    """What to split, and how.

    Args:
        data: folder of ``items.parquet``, ``events.parquet`` and, optionally, ``users.parquet``.
        schema: what its files and columns are called, said over the folder's own ``schema.json``.
        out: folder for the sequences.
        like: prepared folder, or folder of a trained ranker, whose codes of users, columns, tasks and policy the sequences get;
            none given: codes are made of the data's own values.
        protocol: which events train, validate and test.
        engine: what works on shares of a large log: ``local``, all cores of this machine, or ``ray``, a Ray cluster that shares
            the folders; none named: ``local``, of torchrun's processes the first. The sequences are the same.
    """

    out: Path
    like: Path | None = None
    protocol: PrepareConfig = field(default_factory=PrepareConfig)
    engine: str | None = None

    def files(self) -> list[Path]:
        """The files the sequences are made from."""
        own = [] if self.like is None else [open_prepared(prepared_of(self.like)).folder / PREPARED_FILE]
        return [*self.folder.files(), *own]


def main(config: PrepareJobConfig) -> dict[str, Any]:
    """Writes the sequences; one process works, the others wait. Returns counts by split, and what ``Prepared.met`` says.

    A run that was killed goes on from the shares of the log that it has cut and the buckets of users that it has written.

    With ``like`` also ``drift.json``, and prints it: what has moved since; see ``data.drift.drift``.

    Raises:
        DataError: on bad data; names file, column and row.
        SidrecError: if the data cannot be prepared like ``like``; says what differs.
        RunMismatchError: if ``out`` holds sequences of another protocol or other data.
    """
    with process_group(), open_run(config.out, config, inputs=config.files()) as run:
        check_engine(config.engine)
        return run.result or run.finish(on_first_process(lambda: _prepare(config)))


def _prepare(config: PrepareJobConfig) -> dict[str, Any]:
    like = None if config.like is None else open_prepared(prepared_of(config.like))
    folder = config.folder if like is None else like_folder(config.folder, like)
    protocol = config.protocol if like is None else like_config(config.protocol, like)
    for line in _unread(folder, protocol.tasks, like):
        say(line)
    out = config.out / SEQUENCES
    begun = _begun(config.out)
    with stage("prepare sequences", None, show=True) as progress:
        if out.exists():  # of a run that was killed in its last moments
            remove(begun)
            prepared = open_prepared(out)
        else:
            with closing(ENGINES[config.engine or "local"]()) as engine:
                prepared = prepare(folder, out, config.protocol, like, engine, begun)
        progress.advance(0, ", ".join(f"{s} {c['targets']:,} targets" for s, c in prepared.counts.items()))
    for name, met in prepared.met.items():
        if met["count"]:
            say(f"{name.replace('_', ' ')}: {met['count']:,} ({met['policy']})")
    if like is not None:
        report_drift(drift(like, seen_by(like, prepared)), config.out)
    return {**prepared.counts, "met": prepared.met}


def _begun(out: Path) -> Path:
    """Where a run keeps what is not finished, by what it makes of what; what others have begun there is removed."""
    begun = out / f".{sha256_of(out / CONFIG_FILE)[:16]}{BEGUN}"
    for other in out.glob(f".*{BEGUN}"):
        if other != begun:
            remove(other)
    return begun


def _unread(folder: DataFolder, tasks: tuple[str, ...], like: Prepared | None) -> Iterator[str]:
    """A line for each file of which not all is read."""
    events, users = open_events(folder, tasks), open_users(folder)
    if unread := unread_events(events):
        yield f"{events.path}: {in_words(unread)}"
    if users is None:
        return
    features = users.categorical if like is None else tuple(like.user_features)
    if unread := unread_users(users, features):
        yield f"{users.path}: {in_words(unread)}"
