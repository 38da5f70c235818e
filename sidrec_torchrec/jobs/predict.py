"""Writes a trained ranker's probabilities of requests."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec import __version__
from sidrec_torchrec.data.events import Events
from sidrec_torchrec.data.folder import DataFolder, is_data_folder
from sidrec_torchrec.data.parts import find_files
from sidrec_torchrec.data.requests import GivenRequests
from sidrec_torchrec.data.sids import open_sids, sid_files
from sidrec_torchrec.engines.base import open_engine
from sidrec_torchrec.errors import SidrecError, check_at_least
from sidrec_torchrec.files import atomic_path, check_is_no_input, glance, sha256_of
from sidrec_torchrec.output import show
from sidrec_torchrec.part_files import PartFiles, is_of_parts
from sidrec_torchrec.processes import on_first_process
from sidrec_torchrec.ranker.arms import ARMS, Needs
from sidrec_torchrec.ranker.by_user import score_by_user
from sidrec_torchrec.ranker.predictor import Predictor, Scored
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.ranker.warm_start import weight_files
from sidrec_torchrec.storage.mirror import bring, slim
from sidrec_torchrec.storage.urls import absolute, as_urls
from sidrec_torchrec.training.config import JobConfig
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.progress import Stage, stage

_PART_BATCHES = 64  # of 16,384 requests
_FEW_EVENTS, _FEW_REQUESTS = 1 << 22, 1 << 18
_RANKER, _FINGERPRINTS, _VERSION = "sidrec.ranker", "sidrec.fingerprints", "sidrec.version"


@dataclass(frozen=True, kw_only=True)
class PredictConfig(JobConfig):
    """What to score by which ranker.

    Args:
        ranker: folder train-ranker wrote, of any arm.
        out: Parquet file to write; of more than a million requests, a folder of parts by this name.
        requests: Parquet file, or folder of them, with ``user_id``, ``item_id`` and ``timestamp``; other columns are copied.
        newest: instead of ``requests``: score so many last events of each user, whose labels are not read.
        events: file like ``events.parquet``, or data folder, that histories come from; none given: the ranker's data folder.
        users: likewise, like ``users.parquet``; none given: that of ``events``, if it is a folder, else the ranker's.
        prepared: folder of sequences prepared anew, if the item file has more items than the ranker was trained with.
        data: data folder of those sequences, if it is not the ranker's own; events and users are then its own, too.
        sids: folders of its items' SIDs, by the codecs that the ranker reads; none given: the ranker's own folders.
        max_history: most events of a history, the last ones; 0 for as many as the ranker's sequences carry.
        batch_events: events in a batch over all processes, padding included.
        engine: what scores: ``local``, all cores of this machine, or ``ray``, a Ray cluster that shares the folders; none named: ``local``,
            or torchrun's processes.
    """

    ranker: Path
    out: Path
    requests: Path | None = None
    newest: int = 0
    events: Path | None = None
    users: Path | None = None
    prepared: Path | None = None
    data: Path | None = None
    sids: tuple[Path, ...] = ()
    max_history: int = 0
    batch_events: int = 8192
    engine: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "newest", "max_history")
        check_at_least(self, 1, "batch_events")
        if (self.requests is None) == (self.newest == 0):
            raise ValueError("name either --requests, a Parquet file, or --newest, a number of each user's events")


def main(config: PredictConfig) -> dict[str, Any]:
    """Writes the requests, in their order, with ``probability``, or ``probability_TASK`` for each of several tasks; ``predicted_TASK`` is a
    number that a regression predicts.

    Many requests, or events, are cut by user, and each of the engine's processes scores a bucket of users at a time: its memory is bounded by
    the model, a bucket and what ``Predictor`` keeps of users and items. Under torchrun, whose processes may share the model, each keeps
    all events, and scores its share of every batch.

    A run that was killed and is called again goes on from the buckets that are scored, or under torchrun behind the last million
    requests that are written.

    Returns:
        Counts: ``requests``, and those ``without_history``.

    Raises:
        SidrecError: on a folder without a trained ranker, an ``out`` that is in the way, or requests with columns of the
            probabilities' names.
        DataError: on bad requests, events or users; names file, column and row.
        CodecMismatchError: if the folders of SIDs the ranker reads have been encoded anew, by another codec.
    """
    _check_out(config)
    with process_group() as processes, closing(open_engine(config.engine)) as engine:
        predictor = Predictor.open(
            config.ranker,
            events=config.events,
            users=config.users,
            prepared=config.prepared,
            data=config.data,
            sids=config.sids,
            max_history=config.max_history or None,
            batch_events=config.batch_events,
            read=False,
        )
        given = None if config.requests is None else GivenRequests.open(config.requests, predictor.prepared.schema)
        schema = _schema(given, predictor, config)
        files = _files(config, predictor.trained)
        check_is_no_input(config.out, files)
        parts = PartFiles.of(config.out, _made_of(config, files))
        counts, done = on_first_process(lambda: _begin(parts))
        first = done * _PART_BATCHES
        title = f"{predictor.trained.recipe.arm} predict"
        if processes.world_size > 1 or _is_little(predictor.log, given):
            requests = predictor.newest(config.newest) if given is None else given
            with stage(title, requests.num_requests, show=processes.is_main) as progress:
                progress.advance(counts["requests"])
                scored = _advancing(predictor.score(requests, first=first), progress)
                counts = _write(scored, parts, schema, counts, done, is_main=processes.is_main)
                progress.advance(0, _summary(counts))
        else:
            with stage(title, None, show=True) as progress:
                scores = score_by_user(predictor, given, config.newest, parts.scratch, engine, progress)
                counts = _write(scores.batches(first), parts, schema, counts, done, is_main=True)
                progress.advance(0, _summary(counts))
        if processes.is_main:
            show(f"{config.out}: sha256 {sha256_of(config.out)}")
            slim(config.out)
        return counts


def _is_little(log: Events, given: GivenRequests | None) -> bool:
    """Whether one process does it sooner than others start, and holds it."""
    return log.num_events < _FEW_EVENTS and (0 if given is None else given.num_requests) < _FEW_REQUESTS


def _advancing(scored: Iterator[Scored], progress: Stage) -> Iterator[Scored]:
    for batch in scored:
        yield batch
        progress.advance(len(batch.columns))


def _write(
    scored: Iterator[Scored], parts: PartFiles, schema: pa.Schema, counts: dict[str, int], done: int, *, is_main: bool
) -> dict[str, int]:
    """Writes what is scored behind the parts that are done; gives what is counted in all of them."""
    while part := list(islice(scored, 1)):
        with parts.writing(done) as file, _writer(file, schema, is_main=is_main) as write:
            own = dict.fromkeys(counts, 0)
            for batch in chain(part, islice(scored, _PART_BATCHES - 1)):
                write(batch)
                own["requests"] += len(batch.columns)
                own["without_history"] += int(batch.is_without_history.sum())
        if is_main:
            parts.finish(done, own)
        counts = {name: count + own[name] for name, count in counts.items()}
        done += 1
    if not done and is_main:  # no requests: a file of none
        with parts.writing(0) as file, _writer(file, schema, is_main=True):
            pass
    on_first_process(lambda: parts.join(max(1, done)))
    return counts


def _summary(counts: dict[str, int]) -> str:
    return f"{counts['requests']:,} requests, {counts['without_history']:,} without history"


def _begin(parts: PartFiles) -> tuple[dict[str, int], int]:
    """What is known of the parts of a run that was killed, and how many there are."""
    parts.begin()
    counts, done = {"requests": 0, "without_history": 0}, 0
    while (known := parts.known(done)) is not None:
        counts = {name: count + known[name] for name, count in counts.items()}
        done += 1
    return counts, done


def _files(config: PredictConfig, trained: TrainedRanker) -> list[Path]:
    """Of which predictions are made."""
    files = [
        *weight_files(config.ranker),
        *sid_files(config.sids or trained.recipe.sids),
        *trained.recipe.folder.files(),
    ]
    for path in (config.requests, config.events, config.users, config.data):
        if path is not None:
            files += DataFolder.of(path).files() if is_data_folder(path) else find_files(path)
    return files


def _made_of(config: PredictConfig, files: list[Path]) -> Any:
    """What tells these predictions from others: the config, and the looks of the files that they are made of."""
    return [
        as_urls(str(replace(config, engine=None))),
        [[as_urls(str(file)), glance(file)] for file in files if file.exists()],
    ]


def _check_out(config: PredictConfig) -> None:
    bring(config.out, clean=True)
    if config.out.is_dir() and not is_of_parts(config.out):
        raise SidrecError(f"{config.out}: a folder is there; name a file")
    folder = config.requests
    if folder is not None and folder.is_dir() and absolute(config.out.parent) == absolute(folder):
        raise SidrecError(
            f"{config.out}: would be one of the requests the next time; name a file elsewhere than {folder}"
        )


def _schema(given: GivenRequests | None, predictor: Predictor, config: PredictConfig) -> pa.Schema:
    """Of the file that is written; its metadata says what made it.

    Raises:
        SidrecError: if a column has the name of one that is to be added.
    """
    columns = predictor.newest_schema if given is None else given.schema
    for name in predictor.names:
        if name in columns.names:
            raise SidrecError(f"{config.requests}: has a column '{name}' already, which is to be added; rename it")
        columns = columns.append(pa.field(name, pa.float32()))
    metadata = {
        _RANKER: absolute(config.ranker),
        _FINGERPRINTS: json.dumps(_fingerprints(predictor.trained)),
        _VERSION: __version__,
    }
    return columns.with_metadata((columns.metadata or {}) | {k.encode(): v.encode() for k, v in metadata.items()})


def _fingerprints(trained: TrainedRanker) -> dict[str, str]:
    """By folder's name, the codec's fingerprint of the SIDs it reads."""
    recipe = trained.recipe
    sids = recipe.sids if ARMS[recipe.arm].needs is Needs.SIDS else ()
    return {folder.name: open_sids(folder).spec.fingerprint for folder in sids}


@contextmanager
def _writer(out: Path, schema: pa.Schema, *, is_main: bool) -> Iterator[Callable[[Scored], None]]:
    """What writes a batch with its probabilities; nothing but on the main process, there the whole file or none."""
    if not is_main:
        yield lambda batch: None
        return
    with (
        atomic_path(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):

        def write(batch: Scored) -> None:
            columns = [*batch.columns.columns, *map(pa.array, batch.probability_RK.T)]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

        yield write
