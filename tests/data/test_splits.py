"""Sequences of any table of whole users: what an engine of one's own would call."""

import pickle

import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data import scatter as scatter_module
from sidrec_torchrec.data.buckets import EventBuckets
from sidrec_torchrec.data.census import take_census
from sidrec_torchrec.data.features import Coder
from sidrec_torchrec.data.fit_features import fit_users
from sidrec_torchrec.data.format import open_events, open_items, open_users
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.protocol import Splitter
from sidrec_torchrec.data.splits import SPLITS, BucketSequences
from sidrec_torchrec.engines.base import Inline
from tests.data.test_prepare import write_corpus


def as_tables(buckets: EventBuckets, bucket: int) -> tuple[pa.Table, pa.Table]:
    files = [buckets.event_file(bucket, share) for share in range(buckets.shares)], [buckets.user_file(bucket)]
    events, users = (pa.concat_tables([pa.ipc.open_file(path).read_all() for path in paths]) for paths in files)
    return events, users


def test_sequences_of_tables_are_those_that_prepare_writes(tmp_path, monkeypatch):
    write_corpus(tmp_path / "data", users=30, labels=False)
    config = PrepareConfig(max_history=16, targets_per_row=8)
    prepared = prepare(tmp_path / "data", tmp_path / "prepared", config)
    monkeypatch.setattr(scatter_module, "EVENTS_PER_BUCKET", 150)
    items, users, events = (open_(tmp_path / "data") for open_ in (open_items, open_users, open_events))
    features = fit_users(users)
    buckets, _ = scatter_module.scatter(
        tmp_path / "buckets", events, items, users, features, EventPolicy(), [], Inline()
    )
    splitter = Splitter(config, items.num_items)
    census, _ = take_census(buckets, splitter, Inline())
    sequences = pickle.loads(pickle.dumps(BucketSequences(buckets, splitter, census, Coder([], ()))))
    assert buckets.count > 2
    made = pa.concat_tables([sequences(*as_tables(buckets, bucket)) for bucket in range(buckets.count)])
    keys = [("user_id", "ascending"), ("num_targets", "ascending")]
    for split in SPLITS:
        own = made.filter(pa.array([name == split for name in made["split"].to_pylist()])).drop(["split"])
        written = pq.read_table(prepared.path(split))
        assert own.num_rows == written.num_rows > 0

        def rows(table):
            return sorted((row for row in table.sort_by(keys).to_pylist()), key=repr)

        assert rows(own) == rows(written)
