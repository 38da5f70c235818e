"""Several labels per event: how they are read, and what the sequences hold of them."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.format import open_events, validate
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.data.tasks import UNKNOWN, action_of, label_of, num_actions
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import sha256_of
from sidrec_torchrec.jobs import data_validate
from tests.data.test_prepare import rows_of, targets_of, write_corpus

TASKS = ("label", "like", "long_view")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The corpus of ``test_prepare`` with two more labels, one of them bool, both missing at times."""
    folder = tmp_path / "data"
    events = write_corpus(folder)
    rng = np.random.default_rng(1)
    like = [[0, 1, None][i] for i in rng.integers(0, 3, len(events))]
    long_view = [[False, True, None][i] for i in rng.choice(3, len(events), p=[0.5, 0.4, 0.1])]
    write_events(
        folder, events.append_column("like", pa.array(like, pa.int8())).append_column("long_view", [long_view])
    )
    return folder


def write_events(folder: Path, events: pa.Table) -> None:
    pq.write_table(events, folder / "events.parquet", row_group_size=100)


def digits(events: pa.Table, task: str) -> np.ndarray:
    return np.array([UNKNOWN if label is None else int(label) for label in events[task].to_pylist()])


@pytest.mark.parametrize("num_tasks", [1, 2, 3, 4])
def test_an_action_is_all_labels(num_tasks):
    values = [0, 1] if num_tasks == 1 else [0, 1, UNKNOWN]
    labels_NK = np.stack(np.meshgrid(*[values] * num_tasks), -1).reshape(-1, num_tasks).astype(np.int8)
    action_N = action_of(labels_NK)
    assert sorted(action_N) == list(range(num_actions(num_tasks)))
    for k in range(num_tasks):
        np.testing.assert_array_equal(label_of(action_N, k), labels_NK[:, k])
        assert label_of(torch.from_numpy(action_N).long(), k).tolist() == labels_NK[:, k].tolist()
    if num_tasks == 1:
        np.testing.assert_array_equal(action_N, labels_NK[:, 0])


def test_sequences_hold_every_label(data, tmp_path):
    prepared = prepare(data, tmp_path / "out", PrepareConfig(tasks=TASKS, max_history=1000, targets_per_row=4))
    assert prepared.tasks == TASKS and open_prepared(tmp_path / "out") == prepared
    events = pq.read_table(data / "events.parquet")
    for split in SPLITS:
        counted = dict.fromkeys(TASKS, 0)
        for row in rows_of(prepared, split):
            own = events.filter(pa.compute.is_in(events["timestamp"], pa.array(row.timestamp)))  # times are unique
            for k, task in enumerate(TASKS):
                np.testing.assert_array_equal(label_of(row.action, k), digits(own, task))
                counted[task] += int((digits(own, task)[targets_of(row)] != UNKNOWN).sum())
        assert prepared.counts[split]["labels"] == counted
        assert counted["label"] == prepared.counts[split]["targets"] > counted["long_view"] > counted["like"]


def test_naming_the_only_label_changes_nothing(data, tmp_path):
    unnamed = prepare(data, tmp_path / "unnamed", PrepareConfig())
    named = prepare(data, tmp_path / "named", PrepareConfig(tasks=("label",)))
    assert unnamed.counts == named.counts and unnamed.tasks == named.tasks == ("label",)
    for split in SPLITS:
        assert sha256_of(unnamed.path(split)) == sha256_of(named.path(split))


def test_any_column_can_be_the_task(data, tmp_path):
    events = pq.read_table(data / "events.parquet")
    named = prepare(data, tmp_path / "label", PrepareConfig())
    write_events(data, events.rename_columns(["user_id", "item_id", "timestamp", "click", "like", "long_view"]))
    renamed = prepare(data, tmp_path / "click", PrepareConfig(tasks=("click",)))
    assert renamed.tasks == ("click",) and not renamed.sampled_negatives
    assert sha256_of(named.path("test")) == sha256_of(renamed.path("test"))
    assert prepare(data, tmp_path / "none", PrepareConfig()).sampled_negatives  # nothing is named, there is no `label`


def test_validation_counts_labels(data, capsys):
    labels = validate(data, TASKS)["labels"]
    events = pq.read_table(data / "events.parquet")
    for task in TASKS:
        counts = np.bincount(digits(events, task), minlength=3)
        assert labels[task] == {"rate": pytest.approx(counts[1] / counts[:2].sum()), "missing": counts[UNKNOWN]}
    data_validate.main(data_validate.DataValidateConfig(data=data, tasks=TASKS))
    assert "label 'like'" in capsys.readouterr().out


def test_errors(data, tmp_path):
    path, events = data / "events.parquet", pq.read_table(data / "events.parquet")

    def attempt(
        values: list | None, kind: pa.DataType | None = None, tasks: tuple[str, ...] = ("label", "like")
    ) -> str:
        table = events if values is None else events.set_column(4, "like", pa.array(values, kind or pa.int8()))
        write_events(data, table)
        with pytest.raises(DataError) as caught:
            list(open_events(data, tasks).batches(64))
        return str(caught.value)

    n = len(events)
    first_null = events["like"].to_pylist().index(None)
    assert attempt(None, tasks=("like",)).startswith(f"{path}: column 'like', row {first_null}: null; every row needs")
    assert attempt(None, tasks=("label", "share")).startswith(
        f"{path}: no label column 'share'; the file has 'user_id'"
    )
    assert attempt([None] * 99 + [2] * (n - 99)) == f"{path}: column 'like', row 99: 2; a label is 0 or 1"
    assert attempt([0.5] * n, pa.float64()) == f"{path}: column 'like', row 0: 0.5; a label is 0 or 1"
    assert attempt([None] * 9 + [1] * (n - 9)).startswith(
        f"{path}: column 'like' is 1 in all {n - 9} rows that have it; a ranker needs both classes"
    )
    assert "column 'like' is 0 in all 0 rows that have it" in attempt([None] * n)
    for tasks in (("label", "label"), tuple("abcde")):
        with pytest.raises(ValueError, match="name each task once, and 4 tasks at most, got"):
            PrepareConfig(tasks=tasks)


def test_a_task_without_labels_to_train_on_is_refused(data, tmp_path):
    prepared = prepare(data, tmp_path / "out", PrepareConfig(tasks=TASKS))
    tested = {(row.user_id, t) for row in rows_of(prepared, "test") for t in row.timestamp[targets_of(row)]}
    events = pq.read_table(data / "events.parquet")
    keys = zip(events["user_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True)
    like = [label if key in tested else None for key, label in zip(keys, events["like"].to_pylist(), strict=True)]
    write_events(data, events.set_column(4, "like", pa.array(like, pa.int8())))
    with pytest.raises(DataError, match="column 'like' is null for all train targets; leave the task out"):
        prepare(data, tmp_path / "refused", PrepareConfig(tasks=TASKS))
