"""The ranker job: every arm trains, resumes, evaluates, and does not depend on the number of processes."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.sequences import from_table
from sidrec_torchrec.errors import CodecMismatchError, DataError, RunMismatchError, SidrecError
from sidrec_torchrec.files import read_json
from sidrec_torchrec.jobs import evaluate, train_ranker
from sidrec_torchrec.jobs.train_ranker import TrainRankerConfig
from sidrec_torchrec.ranker.arms import ARMS, ArmConfig, Tokenizers
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers import READERS
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.training.checkpoints import BEST, LAST, Checkpoints
from sidrec_torchrec.training.config import config_from_json, config_json
from sidrec_torchrec.training.group import process_group

SMALL = RankerConfig(dim=16, num_heads=2, head_dims=(16, 8), dropout=0.0)


def make_config(
    corpus: Path, prepared: Path, sids: dict[str, Path], out: Path, arm: str, **changes
) -> TrainRankerConfig:
    config = TrainRankerConfig(
        data=corpus,
        prepared=prepared,
        out=out,
        arm=arm,
        sids=(sids["text" if ARMS[arm].tokenizers is Tokenizers.PER_SOURCE else "side"],),
        epochs=2,
        batch_events=1024,
        model=SMALL,
        arm_options=ArmConfig(table_dim=16, ngram_rows=200, piece_rows=40),
    )
    return dataclasses.replace(config, **changes)


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_arm_learns(arm, corpus, prepared, sids, tmp_path):
    config = make_config(corpus, prepared, sids, tmp_path / arm, arm, epochs=4)
    result = train_ranker.main(config)
    assert result["train_loss"][-1] < result["train_loss"][0]
    assert 0.3 < result["test"]["ne_all"] < 1.02
    counts = json.loads((prepared / "prepared.json").read_text())["counts"]
    assert result["test"]["targets_all"] == counts["test"]["targets"]
    assert result["test"]["targets_all"] == result["test"]["targets_warm"] + result["test"]["targets_cold"]
    kjt = {"none": 0, "raw": 2 * (12 + 8), "prefix-ngram": 16, "side": 8, "learned-side": 8, "hybrid": 16, "id": 8}
    kjt["all-ngram"] = 24  # two digits: each alone, and both
    kjt |= {
        "pieces": 16,
        "hashed-id": 16,
        "projected": 20,
    }  # two digits; two hashes; all 12 + 8 components, a byte each
    kjt |= {"pq": 8, "side-pieces": 8 + 10 * 8}  # ten trits
    assert result["bytes_per_event_kjt"] == kjt[arm]
    # id: a row of 16 floats per item; prefix-ngram: 200 rows; side: two chunks of 243 values of 16 floats at most
    tables = {"none": (0, 0), "raw": (0, 0), "id": (7680, 7680), "prefix-ngram": (12800, 12800), "side": (1, 35_000)}
    tables["all-ngram"] = tables["prefix-ngram"]
    tables["pieces"] = (40 * 16 * 4, 40 * 16 * 4)
    tables |= {"hashed-id": tables["prefix-ngram"], "projected": (20 * 4, 20 * 4)}  # a scale per component
    tables["learned-side"] = (2, 70_000)  # and the rows they started with
    tables["hybrid"] = (2187 * 16 * 4, 2187 * 16 * 4 + 35_000)  # 7 trits, and SIDE
    tables["pq"] = (256 * 20 * 4, 256 * 20 * 4)
    tables["side-pieces"] = (40 * 16 * 4, 40 * 16 * 4 + 35_000)
    assert tables[arm][0] <= result["table_bytes"] <= tables[arm][1]
    assert train_ranker.main(config) == result  # read back
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / arm)) == result["test"]


@pytest.mark.parametrize("arm", ["side", "learned-side"])
def test_attention_to_codes_learns(arm, corpus, prepared, sids, tmp_path):
    model = dataclasses.replace(SMALL, attention="codes")
    arm_options = ArmConfig(side_mode="decoded")
    changes = {"model": model, "arm_options": arm_options, "epochs": 4}
    config = make_config(corpus, prepared, sids, tmp_path / "codes", arm, **changes)
    result = train_ranker.main(config)
    assert result["train_loss"][-1] < result["train_loss"][0]
    assert 0.3 < result["test"]["ne_all"] < 1.02
    assert result["bytes_per_event_kjt"] == 8
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "codes")) == result["test"]


@pytest.mark.parametrize("attention", list(READERS))
def test_learned_queries_and_blocks_learn(attention, corpus, prepared, sids, tmp_path):
    model = dataclasses.replace(SMALL, attention=attention, learned_queries=2, blocks=1, block_events=8)
    config = make_config(corpus, prepared, sids, tmp_path / "run", "side", model=model, epochs=4)
    result = train_ranker.main(config)
    assert result["train_loss"][-1] < result["train_loss"][0]
    assert 0.3 < result["test"]["ne_all"] < 1.02
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "run")) == result["test"]


def test_attention_to_codes_needs_codes(corpus, prepared, sids, tmp_path):
    model = dataclasses.replace(SMALL, attention="codes")
    with pytest.raises(SidrecError, match="needs an arm whose SIDs travel: side, learned-side; got 'raw'"):
        train_ranker.main(make_config(corpus, prepared, sids, tmp_path / "raw", "raw", model=model))
    with pytest.raises(SidrecError, match="unknown reader 'dense'; there are codes, vectors"):
        RankerConfig(attention="dense")


def test_side_reads_a_sid_per_source(corpus, prepared, sids, tmp_path):
    both = (sids["side"], sids["text"])
    one = train_ranker.main(make_config(corpus, prepared, sids, tmp_path / "one", "side"))
    config = make_config(corpus, prepared, sids, tmp_path / "two", "side")
    two = train_ranker.main(dataclasses.replace(config, sids=both))
    assert two["bytes_per_event_kjt"] == 16 and two["table_bytes"] > one["table_bytes"]
    assert two["train_loss"][-1] < two["train_loss"][0]
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "two")) == two["test"]


def train_here(config: TrainRankerConfig) -> dict:
    return train_ranker.main(config)


def assert_two_processes_equal(config: TrainRankerConfig, one: dict, out: Path, run_distributed) -> None:
    """Two processes, writing to ``out``, say the same, and what one process said of the same config."""
    first, second = run_distributed(train_here, 2, dataclasses.replace(config, out=out))
    assert first == second
    assert first["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    for name in ("ne_all", "ne_warm", "ne_cold", "targets_all"):
        assert first["test"][name] == pytest.approx(one["test"][name], rel=1e-3)


@pytest.mark.parametrize("arm", ["side", "hybrid", "pieces", "hashed-id"])
def test_two_processes_equal_one(arm, corpus, prepared, sids, tmp_path, run_distributed):
    """Same global batches, so the same training up to rounding and, off here, dropout; NE within 1e-4."""
    # Two wide user tables: each goes whole to one process, and the other's checkpoint does without it.
    changes = {
        "model": dataclasses.replace(SMALL, dim=64),
        "arm_options": ArmConfig(table_dim=16, ngram_rows=200, piece_rows=40, table_dropout=0, digit_dropout=0),
    }
    one = train_ranker.main(make_config(corpus, prepared, sids, tmp_path / "one", arm, **changes))
    results = run_distributed(train_here, 2, make_config(corpus, prepared, sids, tmp_path / "two", arm, **changes))
    assert results[0] == results[1]
    two = results[0]
    assert two["test"]["targets_all"] == one["test"]["targets_all"]
    assert two["table_bytes"] == one["table_bytes"]
    assert two["train_loss"] == pytest.approx(one["train_loss"], abs=1e-4)
    for name in ("ne_all", "ne_warm", "ne_cold"):
        assert two["test"][name] == pytest.approx(one["test"][name], abs=1e-4)
    # what two processes trained, one can read
    values = evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "two"))
    assert values["ne_all"] == pytest.approx(two["test"]["ne_all"], abs=1e-6)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("arm", "after"), [("side", 2), ("id", 2), ("learned-side", 2), ("hybrid", 2), ("id", BEST), ("side", [BEST, LAST])]
)
def test_interrupted_run_goes_on_where_it_was(arm, after, corpus, prepared, sids, tmp_path, monkeypatch):
    changes = {"checkpoint_batches": 2, "model": dataclasses.replace(SMALL, dropout=0.2)}  # dropout goes on as well
    whole = train_ranker.main(make_config(corpus, prepared, sids, tmp_path / "whole", arm, **changes))
    config = make_config(corpus, prepared, sids, tmp_path / "killed", arm, **changes)
    save, saves = Checkpoints.save, []

    def save_then_die(self, name, state):
        save(self, name, state)
        saves.append(name)
        if after in (len(saves), name, saves[-2:]):  # within the first epoch, in its end, and right after it
            raise Killed

    monkeypatch.setattr(Checkpoints, "save", save_then_die)
    with pytest.raises(Killed):
        train_ranker.main(config)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    monkeypatch.setattr(Checkpoints, "save", save)
    resumed = train_ranker.main(config)
    assert resumed["train_loss"] == whole["train_loss"]
    assert resumed["test"] == whole["test"]


def test_refusals(corpus, prepared, sids, tmp_path):
    config = make_config(corpus, prepared, sids, tmp_path / "run", "none", epochs=1)
    train_ranker.main(config)
    with pytest.raises(RunMismatchError, match="another run .*seed was 0, is 1"):
        train_ranker.main(dataclasses.replace(config, seed=1))
    with pytest.raises(SidrecError, match="unknown arm 'sid'; there are none, raw"):
        train_ranker.main(dataclasses.replace(config, arm="sid", out=tmp_path / "a"))
    for arm in ("side", "prefix-ngram"):
        with pytest.raises(SidrecError, match=f"the arm '{arm}' needs SIDs; name the folders"):
            train_ranker.main(dataclasses.replace(config, arm=arm, sids=(), out=tmp_path / "b"))
    both = (sids["side"], sids["text"])
    with pytest.raises(SidrecError, match="the arm 'hybrid' reads one SID, got side, text"):
        train_ranker.main(dataclasses.replace(config, arm="hybrid", sids=both, out=tmp_path / "c"))
    with pytest.raises(SidrecError, match="two folders of one name"):
        train_ranker.main(dataclasses.replace(config, arm="side", sids=both[:1] * 2, out=tmp_path / "c"))
    with pytest.raises(SidrecError, match="n-grams of the SIDs 'side': .* all one-hot of one size"):
        train_ranker.main(dataclasses.replace(config, arm="all-ngram", sids=both[:1], out=tmp_path / "c"))
    deep = ArmConfig(ngram_depth=3)
    with pytest.raises(SidrecError, match="n-grams of the SIDs 'text': depth must be 1 to 2"):
        train_ranker.main(
            dataclasses.replace(config, arm="prefix-ngram", sids=both[1:], arm_options=deep, out=tmp_path / "c")
        )
    few = ArmConfig(piece_rows=16)
    with pytest.raises(SidrecError, match="pieces of the SIDs 'text': num_rows must be 17 at least.*raise piece_rows"):
        train_ranker.main(dataclasses.replace(config, arm="pieces", sids=both[1:], arm_options=few, out=tmp_path / "c"))
    codes = dataclasses.replace(SMALL, attention="codes")
    with pytest.raises(SidrecError, match="attention to codes reads one SID of each event; this arm has 2"):
        train_ranker.main(dataclasses.replace(config, arm="side", sids=both, model=codes, out=tmp_path / "c"))
    with pytest.raises(DataError, match="prepared.json: not found"):
        train_ranker.main(dataclasses.replace(config, prepared=tmp_path, out=tmp_path / "d"))
    with pytest.raises(SidrecError, match="run.json: not found"):
        evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "nothing"))
    with pytest.raises(SidrecError, match="unknown split 'tests'"):
        evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "run", split="tests"))


def test_sids_of_another_codec_are_refused(corpus, prepared, sids, tmp_path):
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    (mixed / "sids.parquet").symlink_to(sids["text"] / "sids.parquet")
    (mixed / "codec").symlink_to(sids["side"] / "codec")
    config = make_config(corpus, prepared, {"side": mixed, "text": sids["text"]}, tmp_path / "run", "side")
    with pytest.raises(CodecMismatchError, match="made with codec .* but this is codec"):
        train_ranker.main(config)


@pytest.mark.parametrize(("arm", "name"), [("side", "side"), ("prefix-ngram", "text")])
def test_a_folder_of_sids_encoded_anew_by_another_codec_is_refused(arm, name, corpus, prepared, sids, tmp_path):
    folder = shutil.copytree(sids[name], tmp_path / name)
    config = make_config(corpus, prepared, sids | {name: folder}, tmp_path / "run", arm, epochs=1)
    result = train_ranker.main(config)
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out)) == result["test"]
    shutil.rmtree(folder)
    shutil.copytree(sids["text" if name == "side" else "side"], folder)
    with pytest.raises(CodecMismatchError, match=f"{name}: SIDs of codec .*; the ranker was trained on SIDs of codec"):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out))
    trained_on = (config.out / "trained_on").rename(tmp_path / "trained_on")
    with pytest.raises(CodecMismatchError, match="trained on SIDs of another codec: .*codec.json has changed"):
        evaluate.main(evaluate.EvaluateConfig(ranker=config.out))  # of an earlier version
    trained_on.rename(config.out / "trained_on")
    with pytest.raises(RunMismatchError, match="made from other inputs"):
        train_ranker.main(config)


def test_other_items_than_prepared_are_refused(corpus, prepared, sids, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    items = pq.read_table(corpus / "items.parquet")
    pq.write_table(items.take(list(range(items.num_rows))[::-1]), data / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet: not the items that .* was prepared from"):
        train_ranker.main(make_config(data, prepared, sids, tmp_path / "run", "raw"))


def test_config_survives_json(corpus, prepared, sids, tmp_path):
    config = make_config(corpus, prepared, sids, tmp_path / "run", "side")
    kept = json.loads(json.dumps(config_json(config, tmp_path)))
    assert config_from_json(TrainRankerConfig, kept, tmp_path) == config


def test_candidate_never_sees_its_own_label(corpus, prepared, sids, tmp_path):
    """Flipping the actions of a row's last event changes no prediction but through later events' history."""
    config = make_config(corpus, prepared, sids, tmp_path / "run", "side")
    with process_group() as processes:
        parts = config.open()
        model = parts.sharded(processes).eval()
        batch = next(iter(parts.batches("test", processes)))
        with torch.no_grad():
            _, before = model(batch)
            last_N = batch.lengths_B.cumsum(0) - 1
            batch.action_N[last_N] = 1 - batch.action_N[last_N]
            _, after = model(batch)
            torch.testing.assert_close(before.prediction, after.prediction)
            assert not torch.equal(before.label, after.label)
            first_N = last_N - batch.lengths_B + 1
            batch.action_N[first_N] = 1 - batch.action_N[first_N]
            assert not torch.allclose(before.prediction, model(batch)[1].prediction)


def test_pieces_stay_those_of_training_on_other_sequences(corpus, prepared, sids, tmp_path):
    other = prepare(corpus, tmp_path / "other", PrepareConfig(seed=1)).folder
    config = make_config(corpus, prepared, sids, tmp_path / "run", "pieces")
    train_ranker.main(config)
    item_N = np.arange(120, dtype=np.int32)
    with process_group():
        trained = TrainedRanker.open(config.out)
        arms = (config.open().arm, trained.parts(other).arm)
    own, tested = (arm.values(item_N)["text_pieces"] for arm in arms)
    anew = dataclasses.replace(config, prepared=other).open().arm.values(item_N)["text_pieces"]
    assert own.equal(tested) and not own.equal(anew)
    assert 0 < evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=other))["ne_all"] < 1.1


def test_a_ranker_is_tested_on_a_later_week(corpus, sids, tmp_path, capsys):
    """What is warm is what it was trained on, not what the later sequences have for training."""
    time_N = pq.read_table(corpus / "events.parquet")["timestamp"].to_numpy()
    first, later = (int(np.quantile(time_N, share)) for share in (0.3, 0.8))
    folders = [
        prepare(corpus, tmp_path / name, PrepareConfig(split="time", test_from=cut, validation_fraction=0.2))
        for name, cut in (("first", first), ("later", later))
    ]
    config = make_config(corpus, folders[0].folder, sids, tmp_path / "run", "side")
    train_ranker.main(config)
    capsys.readouterr()
    out = tmp_path / "later.json"
    values = evaluate.main(evaluate.EvaluateConfig(ranker=config.out, prepared=folders[1].folder, out=out))
    printed = capsys.readouterr().out
    shown = values | {"bootstrap": {n: {"interval": own["interval"]} for n, own in values["bootstrap"].items()}}
    assert read_json(out) == values and json.loads(printed) == shown
    assert printed.count("\n") < 110 and '{ "bucket": "no earlier event", "targets":' in printed
    age = {row["bucket"]: row["targets"] for row in values["breakdown"]["model_age"]["label"]}
    assert age["30 days and more"] == values["targets_all"] == (time_N >= later).sum()
    popularity = {row["bucket"]: row["targets"] for row in values["breakdown"]["item_training_events"]["label"]}
    assert popularity["0"] == values["targets_cold"]
    tested = [row.item[len(row) - row.num_targets :] for row in from_table(pq.read_table(folders[1].path("test")))]
    assert values["targets_cold"] == (~folders[0].seen()[np.concatenate(tested)]).sum()


def without_drift(values: dict) -> dict:
    return {name: value for name, value in values.items() if name != "drift"}


@pytest.mark.parametrize("arm", ["none", "side"])
def test_without_user_features_nothing_is_sharded(arm, corpus, sids, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("items.parquet", "events.parquet"):
        (data / name).symlink_to(corpus / name)
    prepare(data, tmp_path / "sequences", PrepareConfig())
    config = make_config(data, tmp_path / "sequences", sids, tmp_path / "run", arm)
    result = train_ranker.main(config)
    assert result["train_loss"][1] < result["train_loss"][0]
    assert evaluate.main(evaluate.EvaluateConfig(ranker=tmp_path / "run")) == result["test"]
