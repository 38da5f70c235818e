"""Rankers that start from trained ones: the same weights, or a refusal that says what they would be taken for."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs import evaluate, train_ranker
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.ranker.arms import ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig

SMALL = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), dropout=0.0)
PROTOCOL = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2)


def start(corpus: Path, prepared: Path, sids: dict[str, Path], out: Path, **changes) -> TrainRankerConfig:
    """A trained ranker."""
    config = TrainRankerConfig(
        data=corpus,
        prepared=prepared,
        out=out,
        sids=(sids["side"],),
        epochs=1,
        batch_events=1024,
        model=SMALL,
        arm_options=ArmConfig(table_dim=16),
    )
    config = dataclasses.replace(config, **changes)
    train_ranker.main(config)
    return config


def still(config: TrainRankerConfig, ranker: Path, out: Path, **changes) -> TrainRankerConfig:
    """Started from the ranker, and trained without a step: rates are 0."""
    optimizer = dataclasses.replace(config.optimizer, learning_rate=0.0, table_learning_rate=0.0)
    return dataclasses.replace(config, init=ranker, out=out, epochs=1, seed=7, optimizer=optimizer, **changes)


@pytest.mark.parametrize("arm", ["side", "learned-side", "hybrid", "id"])
def test_a_ranker_starts_from_the_best_weights_of_another(arm, corpus, prepared, sids, tmp_path):
    config = start(corpus, prepared, sids, tmp_path / "first", arm=arm)
    first = evaluate.main(evaluate.EvaluateConfig(ranker=config.out))
    second = train_ranker.main(still(config, config.out, tmp_path / "second"))["test"]
    plain = {name: value for name, value in first.items() if not isinstance(value, dict)}
    assert {name: second[name] for name in plain} == pytest.approx(plain, rel=1e-6)
    # and is a ranker like any other
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "second")) == second


def test_a_ranker_goes_on_from_there(corpus, prepared, sids, tmp_path):
    config = start(corpus, prepared, sids, tmp_path / "first")
    longer = dataclasses.replace(config, init=config.out, out=tmp_path / "second", epochs=1)
    anew = dataclasses.replace(config, out=tmp_path / "third", epochs=1)
    losses = [train_ranker.main(each)["train_loss"][0] for each in (longer, anew)]
    assert losses[0] < losses[1]


def test_weights_that_would_mean_something_else_are_refused(corpus, prepared, sids, tmp_path):
    config = start(corpus, prepared, sids, tmp_path / "first")

    def refused(match: str, error: type = SidrecError, **changes) -> None:
        with pytest.raises(error, match=match):
            train_ranker.main(still(config, config.out, tmp_path / "refused", **changes))

    wider = dataclasses.replace(SMALL, dim=32)
    refused(r"'.*' is \[.*32.*\] here and is \[.*16.*\] in it", model=wider)
    refused("is none of its weights", model=dataclasses.replace(SMALL, cross_layers=2))
    deep = start(corpus, prepared, sids, tmp_path / "deep", model=dataclasses.replace(SMALL, cross_layers=2))
    with pytest.raises(SidrecError, match="has '.*', which is nothing here"):
        train_ranker.main(still(config, deep.out, tmp_path / "refused"))
    refused("its arm is 'side', not 'hybrid'", arm="hybrid")
    refused("its SIDs are of codec", sids=(sids["text"],))


def test_rows_of_other_values_and_items_are_refused(corpus, prepared, sids, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("items.parquet", "events.parquet"):
        (other / name).symlink_to(corpus / name)
    users = pq.read_table(corpus / "users.parquet")
    column = next(name for name in users.column_names if name != "user_id")
    values = [f"{value} renamed" for value in users[column].to_pylist()]
    users = users.set_column(users.column_names.index(column), column, [values])
    pq.write_table(users, other / "users.parquet")
    prepare(other, tmp_path / "sequences", PROTOCOL)
    config = start(corpus, prepared, sids, tmp_path / "first")
    changes = {"data": other, "prepared": tmp_path / "sequences"}
    with pytest.raises(SidrecError, match=f"its user feature '{column}' has other values"):
        train_ranker.main(still(config, config.out, tmp_path / "refused", **changes))

    reordered = tmp_path / "reordered"
    reordered.mkdir()
    items = pq.read_table(corpus / "items.parquet")
    pq.write_table(items.take(np.arange(len(items))[::-1]), reordered / "items.parquet")
    for name in ("events.parquet", "users.parquet"):
        (reordered / name).symlink_to(corpus / name)
    prepare(reordered, tmp_path / "reordered-sequences", PROTOCOL)
    config = start(corpus, prepared, sids, tmp_path / "ids", arm="id")
    changes = {"data": reordered, "prepared": tmp_path / "reordered-sequences"}
    with pytest.raises(SidrecError, match="rows of the arm 'id' belong to items, and its items are others"):
        train_ranker.main(still(config, config.out, tmp_path / "refused", **changes))
