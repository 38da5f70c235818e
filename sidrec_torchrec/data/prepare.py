"""From event logs to training, validation and test sequences, as the protocol (``data/protocol.py``) splits them.

Logs without labels hold positives only: each event then gets ``negatives`` items, drawn from the events of other users
in the same part (training or test) and the same kind (seen or cold), so that an item's popularity tells nothing about
its label.

Memory is bounded by the largest bucket of users, whatever the number of events: events are first cut into buckets on
disk by a hash of their user.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.census import Census, take_census
from sidrec_torchrec.data.drift import feature_counts, target_counts
from sidrec_torchrec.data.features import Coder, Draft
from sidrec_torchrec.data.fingerprint import data_fingerprint
from sidrec_torchrec.data.fit_features import choose_users, fit_features, fit_users
from sidrec_torchrec.data.format import DataFolder, Items, open_events, open_items, open_users
from sidrec_torchrec.data.item_arrays import write_rows
from sidrec_torchrec.data.like import like_census, like_config, like_folder, like_users, own_rows
from sidrec_torchrec.data.prepared import (
    COLD_ITEMS_FILE,
    FIRST_EVENT_FILE,
    ITEM_IDS_FILE,
    PREPARED_FILE,
    SEEN_FILE,
    SEQUENCES,
    TRAINING_FILE,
    Prepared,
    open_prepared,
)
from sidrec_torchrec.data.protocol import PrepareConfig, Splitter
from sidrec_torchrec.data.scatter import scatter
from sidrec_torchrec.data.splits import BucketSequences, write_splits
from sidrec_torchrec.data.user_lists import list_names
from sidrec_torchrec.engines.base import Engine, Inline
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import (
    list_files,
    remove_at_once,
    remove_temporaries,
    replace_path,
    sync_to_disk,
    work_folder,
    write_json,
)

_SMALL = 1 << 22  # events of a log for which no other process is started


def prepare(
    data: str | Path | DataFolder,
    out: Path,
    config: PrepareConfig,
    like: Prepared | None = None,
    engine: Engine | None = None,
    begun: Path | None = None,
) -> Prepared:
    """Splits ``data``'s events into sequences under ``out``.

    Args:
        data: the data folder: items, events and, optionally, users.
        out: folder to write; appears only when complete.
        config: the protocol.
        like: earlier sequences whose codes, columns, tasks and policy these have; see ``data.like``. None for their own.
        engine: that works on shares of the log; None for this process alone. It changes nothing of the result, and is not
            used for small logs, which are done sooner than other processes start.
        begun: folder for what is not finished. After a kill it is still there, and a call with the same arguments goes on from the
            shares of the log that have been cut and the buckets that have been written; the caller answers for it that they are
            the same, and that one process at a time calls. None for one of its own, which a kill leaves of no use.

    Raises:
        DataError: on bad events (names file, column, row), what the policy refuses, or a protocol that leaves nothing to
            train or test on.
    """
    data = DataFolder.of(data)
    if like is not None:
        data, config = like_folder(data, like), like_config(config, like)
    elif config.test_only:
        raise DataError("test_only needs sequences that a ranker was trained on: name them, or the ranker, with --like")
    items, users = open_items(data, sources=(), targets=()), open_users(data)
    user_features = fit_users(users) if like is None else like_users(data, users, like)
    users = users and choose_users(users, user_features)
    fingerprint = data_fingerprint(data)
    with work_folder(out, begun) as work:
        folder = work / SEQUENCES
        events = open_events(data, config.tasks)
        if like is not None:
            tasks = () if like.sampled_negatives else events.tasks  # whatever labels there are
            events = replace(events, tasks=tasks, features=like.features.named)
        drafts = [Draft.of(events, named) for named in events.features]
        working = engine or Inline()
        if events.num_events < _SMALL:
            working = working.for_little()
        buckets, counted = scatter(
            work / "buckets",
            events,
            items,
            users,
            user_features,
            config.policy,
            drafts,
            working,
            to_learn=not config.test_only,
        )
        splitter = Splitter(config, items.num_items)
        census, met = take_census(buckets, splitter, working)
        counted.add(met)
        if like is not None and config.test_only:
            census = like_census(census, own_rows(like, items.ids(), items.path), like)
        if like is not None:
            features = like.features
        else:
            features = fit_features(data, events, items, buckets, splitter, census, drafts, working)
        vocabularies = {feature.name: feature.codes_json() for feature in user_features}
        sequences = BucketSequences(
            buckets,
            splitter,
            census,
            Coder(drafts, features.of_log),
            tuple(features.columns),
            list_names(vocabularies),
        )
        counts, moments = write_splits(folder, work / "written", sequences, working, counted.why_so_few(config.policy))
        for own in moments if like is None else ():
            own.check(events.path, "training targets")
        regressions = tuple(own.regression() for own in moments) if like is None else like.regressions
        _write_items(folder, items, splitter, census)
        tasks = sequences.tasks
        write_json(
            folder / PREPARED_FILE,
            {
                "num_items": items.num_items,
                "user_features": {feature.name: feature.size for feature in user_features},
                "sampled_negatives": not buckets.is_labeled,
                "tasks": tasks,
                "data": fingerprint,
                "counts": counts,
                "max_history": config.max_history,
                "vocabularies": vocabularies,
                "policy": asdict(config.policy),
                "schema": data.schema.to_json(),
                "met": counted.to_json(config.policy),
                "last_training_event": census.last_training_event,
                "targets_per_row": config.targets_per_row,
                "negatives": None if buckets.is_labeled else config.negatives,
                "profile": {
                    "features": feature_counts(users, user_features),
                    "test": target_counts(
                        folder / "test",
                        tasks,
                        census.training_I,
                        features.of_log,
                        [own.name for own in regressions],
                    ),
                },
                **({"features": features.to_json()} if len(features) else {}),
                **({"regressions": [asdict(own) for own in regressions]} if regressions else {}),
            },
            sealed=True,
        )
        remove_temporaries(folder)  # of a call that was killed
        list_files(folder)
        sync_to_disk(folder)
        remove_at_once(work / "written")  # else a call that finds it would look for parts that have moved
        replace_path(folder, out)
    return open_prepared(out)


def _write_items(folder: Path, items: Items, splitter: Splitter, census: Census) -> None:
    """What is known of each item, by its row; and the ids."""
    for name, array_I in (
        (SEEN_FILE, census.seen_I),
        (TRAINING_FILE, census.training_I),
        (FIRST_EVENT_FILE, census.first_event_I),
    ):
        write_rows(folder / name, array_I.shape, array_I.dtype, iter([array_I]))
    cold = items.ids().filter(pa.array(splitter.is_cold(census.first_event_I)))
    for name, ids in ((COLD_ITEMS_FILE, cold), (ITEM_IDS_FILE, items.ids())):
        pq.write_table(pa.table({"item_id": ids}), folder / name, compression="zstd", write_page_checksum=True)
