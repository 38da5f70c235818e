"""From day 0 to day 7: a ranker meets users, days and items that it was not trained on."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec import cli
from sidrec_torchrec.data.like import prepared_of
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.prepared import open_prepared
from sidrec_torchrec.errors import CodecMismatchError, DataError, RunMismatchError, SidrecError
from sidrec_torchrec.files import read_json
from sidrec_torchrec.jobs import encode_corpus, evaluate, export, predict, train_ranker
from sidrec_torchrec.jobs import prepare as prepare_job
from sidrec_torchrec.jobs.evaluate import EvaluateConfig
from sidrec_torchrec.jobs.prepare import PrepareJobConfig
from sidrec_torchrec.ranker.arms import ARMS, Tokenizers
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.training.group import process_group
from tests.jobs.test_train_ranker import SMALL, make_config

KINDS = ("warm", "cold", "all")


def encode(data: Path, sids: dict[str, Path], name: str, out: Path) -> Path:
    tokenizer = sids[name].parent / "tokenizers" / name
    encode_corpus.main(encode_corpus.EncodeCorpusConfig(data=data, tokenizer=tokenizer, out=out))
    return out


def write(folder: Path, items: pa.Table, events: pa.Table, users: pa.Table) -> Path:
    folder.mkdir(parents=True)
    for name, table in {"items": items, "events": events, "users": users}.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


@dataclasses.dataclass(frozen=True)
class World:
    """Day 0 holds 100 of the items and nine tenths of the time; ``moved`` all the time, day 0's items in another order among new ones
    that no event is on; ``day7`` all."""

    folder: Path
    day0: Path
    moved: Path
    same: Path
    day7: Path
    prepared: Path
    sids: dict[str, dict[str, Path]]

    def sids_of(self, data: Path, arm: str) -> tuple[Path, ...]:
        return (self.sids[data.name]["text" if ARMS[arm].tokenizers is Tokenizers.PER_SOURCE else "side"],)


@pytest.fixture(scope="module")
def world(corpus, sids, tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    items, events, users = (pq.read_table(corpus / f"{name}.parquet") for name in ("items", "events", "users"))
    rng = np.random.default_rng(0)
    order = rng.permutation(items.num_rows)
    end = int(np.quantile(events["timestamp"].to_numpy(), 0.9))
    old_items = items.take(order[:100])
    is_old = np.isin(events["item_id"].to_numpy(), old_items["item_id"].to_numpy())
    is_early = events["timestamp"].to_numpy() <= end
    shuffled = items.take(rng.permutation(items.num_rows))
    day0 = write(folder / "day0", old_items, events.filter(pa.array(is_old & is_early)), users)
    same = write(folder / "same", old_items, events.filter(pa.array(is_old)), users)
    moved = write(folder / "moved", shuffled, events.filter(pa.array(is_old)), users)
    day7 = write(folder / "day7", shuffled, events, users)
    prepared = folder / "prepared"
    protocol = PrepareConfig(max_history=48, targets_per_row=32, cold_fraction=0.2, validation_fraction=0.2)
    prepare_job.main(PrepareJobConfig(data=day0, out=prepared, protocol=protocol))
    encoded = {
        data.name: {name: encode(data, sids, name, folder / f"{name}-{data.name}") for name in ("side", "text")}
        for data in (day0, same, moved)
    }
    encoded["day7"] = encoded["moved"]
    return World(folder, day0, moved, same, day7, prepared, encoded)


def train(world: World, arm: str, out: Path, **changes) -> Path:
    config = make_config(world.day0, world.prepared, world.sids["day0"], out, arm, epochs=1, **changes)
    train_ranker.main(dataclasses.replace(config, sids=world.sids_of(world.day0, arm)))
    return out


@pytest.fixture(scope="module")
def ranker(world, tmp_path_factory) -> Path:
    model = dataclasses.replace(SMALL, attention="codes")
    return train(world, "side", tmp_path_factory.mktemp("ranker") / "side", model=model)


def backtest(world: World, ranker: Path, data: Path, arm: str, out: Path, **changes) -> dict:
    config = EvaluateConfig(ranker=ranker, data=data, sids=world.sids_of(data, arm), out=out, **changes)
    return evaluate.main(config)


def ne(values: dict) -> list[float]:
    return [values[f"ne_{kind}"] for kind in KINDS] + [values[f"targets_{kind}"] for kind in KINDS]


@pytest.mark.parametrize("arm", list(ARMS))
def test_rows_of_items_move_and_nothing_else_does(arm, world, tmp_path):
    """The same events on the same items, the items' file being the ranker's own, or one in another order with more items."""
    out = train(world, arm, tmp_path / "ranker")
    same = backtest(world, out, world.same, arm, tmp_path / "same")
    moved = backtest(world, out, world.moved, arm, tmp_path / "moved")
    assert ne(moved) == pytest.approx(ne(same), abs=1e-6)
    # by hand: what the ranker was trained on, of the test events
    own = open_prepared(out / "trained_on")
    events = pq.read_table(world.same / "events.parquet")
    tested = events["item_id"].to_numpy()[events["timestamp"].to_numpy() > own.last_training_event]
    item_ids = pq.read_table(world.day0 / "items.parquet")["item_id"].to_numpy()
    warm = np.isin(tested, item_ids[own.seen()]).sum()
    assert same["targets_warm"] == warm > 0 < same["targets_cold"] == len(tested) - warm
    # sequences that were prepared to train on have seen other items; the ranker has not
    prepare_job.main(PrepareJobConfig(data=world.moved, out=tmp_path / "train", like=out))
    given = {"prepared": tmp_path / "train", "data": world.moved, "sids": world.sids_of(world.moved, arm)}
    values = evaluate.main(EvaluateConfig(ranker=out, **given))
    row_S = np.isin(pq.read_table(world.moved / "items.parquet")["item_id"].to_numpy(), item_ids[own.seen()])
    with process_group():
        parts = TrainedRanker.open(out).parts(given["prepared"], data=_folder(world.moved), sids=given["sids"])
    assert parts.prepared.seen().tolist() == row_S.tolist() != open_prepared(given["prepared"]).seen().tolist()
    assert 0.3 < values["ne_all"] < 1.2 and values["targets_cold"] > 0


def _folder(path: Path):
    from sidrec_torchrec.data.format import DataFolder

    return DataFolder.of(path)


def test_new_items_are_evaluated(world, ranker, tmp_path):
    config = EvaluateConfig(
        ranker=ranker, data=world.day7, sids=world.sids_of(world.day7, "side"), out=tmp_path / "out"
    )
    values = evaluate.main(config)
    own = open_prepared(prepared_of(ranker))
    events = pq.read_table(world.day7 / "events.parquet")
    tested = events["item_id"].to_numpy()[events["timestamp"].to_numpy() > own.last_training_event]
    old = pq.read_table(world.day0 / "items.parquet")["item_id"].to_numpy()
    assert (~np.isin(tested, old)).sum() > 30
    assert values["targets_warm"] == np.isin(tested, old[own.seen()]).sum()
    assert values["targets_all"] == len(tested)
    assert 0.3 < values["ne_cold"] < 1.2
    drift = values["drift"]
    trained = old[own.training_events() > 0]
    assert drift["without_training_events"][1] == pytest.approx((~np.isin(tested, trained)).mean())
    assert read_json(tmp_path / "out" / "drift.json") == drift
    assert read_json(tmp_path / "out" / "metrics.json") == values == evaluate.main(config)  # read back
    with pytest.raises(RunMismatchError):
        evaluate.main(dataclasses.replace(config, test_from=str(own.last_training_event + 86_400)))
    # a later day, the same sequences prepared by hand
    later = dataclasses.replace(config, test_from=str(own.last_training_event + 86_400), out=tmp_path / "later")
    protocol = PrepareConfig(split="time", test_from=later.test_from, test_only=True)
    prepare_job.main(PrepareJobConfig(data=world.day7, out=tmp_path / "by_hand", like=ranker, protocol=protocol))
    by_hand = evaluate.main(dataclasses.replace(config, prepared=tmp_path / "by_hand", out=None))
    assert ne(evaluate.main(later)) == ne(by_hand) != ne(values)


def test_a_renamed_country_moves_nobody_else(world, ranker, tmp_path):
    """Other users, with other values, change nothing; a renamed value is an unknown one."""
    users = pq.read_table(world.day7 / "users.parquet").to_pydict()
    assert set(users["region"]) == set(open_prepared(world.prepared).vocabularies["region"])
    stranger = max(users["user_id"]) + 1
    values = {
        "region": ["0", "A new one", "r", "~"],
        "segment": ["~", "0", "a", "s"],
        "user_id": range(stranger, stranger + 4),
    }
    more = {name: [*column, *values[name]] for name, column in users.items()}
    gone = users["region"][0]
    renamed = more | {"region": ["0" if region == gone else region for region in more["region"]]}
    nulled = users | {"region": [None if region == gone else region for region in users["region"]]}
    values = {}
    for name, table in {"as_was": users, "more": more, "renamed": renamed, "nulled": nulled}.items():
        data = shutil.copytree(world.day7, tmp_path / name)
        pq.write_table(pa.table(table), data / "users.parquet")
        config = EvaluateConfig(
            ranker=ranker, data=data, sids=world.sids_of(world.day7, "side"), out=tmp_path / f"{name}-out"
        )
        values[name] = evaluate.main(config)
    assert ne(values["more"]) == pytest.approx(ne(values["as_was"]), abs=1e-9)
    assert ne(values["renamed"]) == pytest.approx(ne(values["nulled"]), abs=1e-9)
    assert values["renamed"]["ne_all"] != values["as_was"]["ne_all"]
    unknown = values["renamed"]["drift"]["features"]["region"]["unknown"]
    assert unknown == [0, pytest.approx((users["region"].count(gone) + 4) / len(renamed["region"]))]
    assert any("user feature 'region'" in line for line in values["renamed"]["drift"]["warnings"])
    # without --like codes are made anew, and the ranker refuses them by name
    protocol = PrepareConfig(split="time", test_from=10**9)
    events = pq.read_table(world.day7 / "events.parquet")["timestamp"].to_numpy()
    protocol = dataclasses.replace(protocol, test_from=str(int(np.quantile(events, 0.95))))
    prepare_job.main(PrepareJobConfig(data=tmp_path / "more", out=tmp_path / "anew", protocol=protocol))
    given = {"ranker": ranker, "prepared": tmp_path / "anew"}
    message = (
        "prepared with other codes of users than .*side was trained on: user feature 'segment', code 1, is '0' there"
    )
    with pytest.raises(SidrecError, match=message):
        evaluate.main(EvaluateConfig(**given, data=tmp_path / "more", sids=world.sids_of(world.day7, "side")))
    with pytest.raises(SidrecError, match=message):
        predict.main(predict.PredictConfig(**given, newest=1, out=tmp_path / "p.parquet"))


def test_the_ranker_notices_that_its_own_sequences_were_prepared_anew(world, tmp_path):
    own = dataclasses.replace(world, prepared=shutil.copytree(world.prepared, tmp_path / "prepared"))
    out = train(own, "none", tmp_path / "ranker")
    data = shutil.copytree(world.day0, tmp_path / "data")
    users = pq.read_table(data / "users.parquet").to_pydict()
    pq.write_table(pa.table(users | {"region": [f"a {region}" for region in users["region"]]}), data / "users.parquet")
    shutil.rmtree(own.prepared)
    prepare_job.main(PrepareJobConfig(data=data, out=own.prepared))
    for job in (
        lambda: evaluate.main(EvaluateConfig(ranker=out)),
        lambda: predict.main(predict.PredictConfig(ranker=out, newest=1, out=tmp_path / "p.parquet")),
        lambda: export.main(export.ExportConfig(ranker=out, out=tmp_path / "r.pt2", compiled=False)),
    ):
        with pytest.raises(SidrecError, match="user feature 'region', code 1, is 'a "):
            job()
    # its codes are in its own folder, and so are new data's
    prepare_job.main(PrepareJobConfig(data=world.day7, out=tmp_path / "alike", like=out))
    assert open_prepared(tmp_path / "alike").vocabularies == open_prepared(world.prepared).vocabularies


@pytest.mark.parametrize("arm", ["side", "prefix-ngram", "pieces", "hybrid"])
def test_sids_of_another_codec_are_refused(arm, world, corpus, sids, tmp_path):
    out = train(world, arm, tmp_path / "ranker")
    name = "text" if ARMS[arm].tokenizers is Tokenizers.PER_SOURCE else "side"
    tokenizer = read_json(sids[name].parent / "tokenizers" / name / "run.json")
    assert tokenizer["seed"] == 0
    other = encode(
        world.day7, {name: another_tokenizer(corpus, sids, name, tmp_path)}, name, tmp_path / "encoded" / name
    )
    prepare_job.main(PrepareJobConfig(data=world.day7, out=tmp_path / "alike", like=out))
    for given in ({"out": tmp_path / "out"}, {"prepared": tmp_path / "alike"}):
        config = EvaluateConfig(ranker=out, data=world.day7, sids=(other,), **given)
        with pytest.raises(
            CodecMismatchError, match=f"{name}: SIDs of codec .*; the ranker was trained on SIDs of codec"
        ):
            evaluate.main(config)
    assert not (tmp_path / "out" / "metrics.json").exists()


def another_tokenizer(corpus: Path, sids: dict[str, Path], name: str, folder: Path) -> Path:
    from sidrec_torchrec.jobs import train_tokenizer
    from sidrec_torchrec.training.config import config_from_json

    was = sids[name].parent / "tokenizers" / name
    value = {k: v for k, v in read_json(was / "run.json").items() if k not in ("inputs", "out")}
    config = config_from_json(
        train_tokenizer.TrainTokenizerConfig, value | {"out": str(folder / "tokenizers" / name)}, was
    )
    train_tokenizer.main(dataclasses.replace(config, seed=1, out=folder / "tokenizers" / name))
    return folder / name


def test_sids_are_told_apart_by_their_codecs_whatever_their_folders_are_called(world, tmp_path):
    both = tuple(world.sids["day0"].values())
    config = make_config(world.day0, world.prepared, world.sids["day0"], tmp_path / "ranker", "side", epochs=1)
    train_ranker.main(dataclasses.replace(config, sids=both))
    folders = tuple(world.sids["day7"].values())
    given = {"ranker": tmp_path / "ranker", "data": world.day7}
    one = evaluate.main(EvaluateConfig(**given, sids=folders, out=tmp_path / "one"))
    two = evaluate.main(EvaluateConfig(**given, sids=folders[::-1], out=tmp_path / "two"))
    assert ne(one) == ne(two)
    with pytest.raises(SidrecError, match="--sids: the ranker also reads SIDs of codec"):
        evaluate.main(EvaluateConfig(**given, sids=folders[:1], out=tmp_path / "three"))


def test_what_cannot_be_tested_is_refused_in_words(world, ranker, tmp_path):
    sids = world.sids_of(world.day7, "side")
    given = {"ranker": ranker, "data": world.day7, "sids": sids}
    with pytest.raises(ValueError, match="--data needs --out, a folder"):
        EvaluateConfig(**given)
    with pytest.raises(ValueError, match="--test-from and --policy are of --data"):
        EvaluateConfig(ranker=ranker, test_from="2026-10-01")
    with pytest.raises(ValueError, match="--data is tested whole"):
        EvaluateConfig(**given, out=tmp_path / "o", split="train")
    with pytest.raises(DataError, match="no event at or after test_from"):
        evaluate.main(
            EvaluateConfig(
                ranker=ranker,
                data=world.day0,
                sids=(world.sids["day0"]["side"],),
                out=tmp_path / "o",
                test_from="2999-01-01",
            )
        )
    data = shutil.copytree(world.day7, tmp_path / "data")
    (data / "users.parquet").unlink()
    with pytest.raises(DataError, match="has the user features"):
        evaluate.main(EvaluateConfig(ranker=ranker, data=data, sids=sids, out=tmp_path / "o"))
    assert not (tmp_path / "o").exists()
    # an event on an item nobody knows: refused, as the ranker's own would have been, unless it is said what to do
    events = pq.read_table(world.day7 / "events.parquet").to_pydict()
    last = int(np.argmax(events["timestamp"]))
    events["item_id"][last] = -5
    data = write(
        tmp_path / "unknown",
        pq.read_table(world.day7 / "items.parquet"),
        pa.table(events),
        pq.read_table(world.day7 / "users.parquet"),
    )
    config = EvaluateConfig(ranker=ranker, data=data, sids=sids, out=tmp_path / "o")
    with pytest.raises(DataError, match="item_id -5 is not in"):
        evaluate.main(config)
    whole = backtest(world, ranker, world.day7, "side", tmp_path / "whole")
    arguments = [
        "evaluate",
        "--ranker",
        ranker,
        "--data",
        data,
        "--sids",
        *sids,
        "--unknown-items",
        "keep",
        "--out",
        tmp_path / "o",
    ]
    assert cli.main([str(argument) for argument in arguments]) == 0
    assert read_json(tmp_path / "o" / "metrics.json")["targets_all"] == whole["targets_all"] - 1


def test_a_test_within_training_is_warned_of(world, ranker, tmp_path, capsys):
    own = open_prepared(prepared_of(ranker))
    backtest(world, ranker, world.day7, "side", tmp_path / "out", test_from=str(own.last_training_event - 10**6))
    assert "warning: the test begins before the end of the ranker's training" in capsys.readouterr().err


def backtest_here(config: EvaluateConfig) -> dict:
    return evaluate.main(config)


def test_two_processes_say_what_one_does(world, tmp_path, run_distributed):
    out = train(world, "id", tmp_path / "ranker")
    one = backtest(world, out, world.day7, "id", tmp_path / "one")
    config = EvaluateConfig(ranker=out, data=world.day7, out=tmp_path / "two")
    results = run_distributed(backtest_here, 2, config)
    assert results[0] == results[1] and results[0]["drift"] == one["drift"]
    assert ne(results[0]) == pytest.approx(ne(one), abs=1e-6)


def test_prepare_writes_the_drift(world, ranker, tmp_path, capsys):
    config = PrepareJobConfig(data=world.day7, out=tmp_path / "out", like=ranker)
    prepare_job.main(config)
    report = json.loads((tmp_path / "out" / "drift.json").read_text())
    assert set(report["features"]) == {"region", "segment"}
    assert "events before a target, mean" in capsys.readouterr().err
    trained = dataclasses.replace(
        make_config(world.day7, tmp_path / "out", world.sids["day7"], tmp_path / "next", "none"), epochs=1
    )
    train_ranker.main(trained)
    assert open_prepared(tmp_path / "next" / "trained_on").vocabularies == open_prepared(world.prepared).vocabularies


def test_a_ranker_needs_its_own_folder_alone(world, tmp_path):
    """Data, sequences and SIDs that it was trained on may be gone, even for an arm that learns from them."""
    gone = tmp_path / "gone"
    shutil.copytree(world.folder, gone)
    own = dataclasses.replace(
        world, day0=gone / "day0", prepared=gone / "prepared", sids={"day0": {"text": gone / "text-day0", "side": gone}}
    )
    for arm in ("pieces", "projected"):
        out = train(own, arm, tmp_path / arm)
        before = backtest(world, out, world.day7, arm, tmp_path / f"{arm}-before")
        gone.rename(tmp_path / "elsewhere")
        assert ne(backtest(world, out, world.day7, arm, tmp_path / f"{arm}-after")) == ne(before)
        (tmp_path / "elsewhere").rename(gone)
