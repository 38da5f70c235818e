"""A log counted in shares: the same summary and the same errors, wherever the shares begin and whoever counts them."""

import importlib.util
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data import tally
from sidrec_torchrec.data import validate as validate_module
from sidrec_torchrec.data.policy import EventPolicy
from sidrec_torchrec.data.validate import validate
from sidrec_torchrec.engines.base import ENGINES
from sidrec_torchrec.engines.local import LocalEngine
from sidrec_torchrec.errors import DataError

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")
KEEP = EventPolicy(unknown_items="keep", sort=True, min_events=3)


def write(folder: Path, seed: int, *, users: int = 40, events: int = 400, text: bool = False) -> Path:
    """A log in no order, with unknown items, labels and values that are missing."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    vectors = rng.normal(size=(30, 3)).astype(np.float32).tolist()
    vectors[4] = None
    items = {"item_id": np.arange(30), "v": pa.array(vectors, pa.list_(pa.float32())), "kind": ["a", None, "b"] * 10}
    pq.write_table(pa.table(items), folder / "items.parquet", row_group_size=4)
    user_N = rng.integers(users, size=events)
    table = pa.table(
        {
            "user_id": [f"u{user}" for user in user_N] if text else user_N,
            "item_id": rng.integers(32, size=events),
            "timestamp": rng.integers(1000, size=events),
            "label": rng.integers(2, size=events),
            "like": pa.array(rng.integers(2, size=events), mask=rng.random(events) < 0.3),
            "dwell": pa.array(rng.normal(size=events), mask=rng.random(events) < 0.3),
        }
    )
    pq.write_table(table, folder / "events.parquet", row_group_size=37)
    return folder


def in_shares(monkeypatch) -> None:
    for module, name, value in (
        (tally, "_PER_SHARE", 50),
        (tally, "_FEW", 0),
        (validate_module, "_PER_SHARE", 5),
        (validate_module, "_FEW_ITEMS", 0),
    ):
        monkeypatch.setattr(module, name, value)


def alike(left, right) -> bool:
    """Equal, but for the rounding of means."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(alike(left[name], right[name]) for name in left)
    return left == pytest.approx(right, rel=1e-12) if isinstance(left, float) else left == right


@pytest.mark.parametrize("seed", range(4))
def test_shares_add_up(seed, tmp_path, monkeypatch):
    folder = write(tmp_path / "data", seed, text=bool(seed % 2))
    tasks = ("label", "like", "dwell:regression")
    whole = validate(folder, tasks, KEEP)
    assert whole["met"]["unsorted"]["count"] > 50 and whole["met"]["unknown_items"]["count"] > 5
    events = pq.read_table(folder / "events.parquet")
    last: dict = {}
    unsorted = 0
    for user, time in zip(events["user_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True):
        unsorted += time < last.get(user, 0)
        last[user] = time
    assert whole["met"]["unsorted"]["count"] == unsorted and whole["users"] == len(last)
    in_shares(monkeypatch)
    assert alike(validate(folder, tasks, KEEP), whole)


@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=needs_ray)])
def test_engines_count_alike(name, tmp_path, monkeypatch):
    folder = write(tmp_path / "data", 0)
    in_shares(monkeypatch)
    here = validate(folder, (), KEEP)
    with closing(LocalEngine(2) if name == "local" else ENGINES[name]()) as engine:
        monkeypatch.setattr(tally.Tally, "add", None)  # in this process
        assert validate(folder, (), KEEP, engine) == here


@pytest.mark.parametrize("seed", range(6))
def test_errors_are_the_same(seed, tmp_path, monkeypatch):
    """The first event that goes backwards may do so from an earlier share's; what is wrong before it is said, too."""
    rng = np.random.default_rng(seed)
    folder = write(tmp_path / "data", seed, users=200)
    table = pq.read_table(folder / "events.parquet")
    if seed % 3:  # in order, but for one event of a user who was there before
        order = np.argsort(table["timestamp"].to_numpy(), kind="stable")
        table = table.take(order)
        times = np.arange(len(table)) + 10
        times[rng.integers(200, 400)] = 0
        table = table.set_column(2, "timestamp", pa.array(times))
    if seed in (1, 5):
        labels = table["label"].to_pylist()
        labels[int(rng.integers(400))] = 7
        table = table.set_column(3, "label", pa.array(labels))
    pq.write_table(table, folder / "events.parquet", row_group_size=37)
    with pytest.raises(DataError) as whole:
        validate(folder)
    in_shares(monkeypatch)
    with pytest.raises(DataError) as shares:
        validate(folder)
    assert str(shares.value) == str(whole.value)
