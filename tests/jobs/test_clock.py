"""A clock that was years ahead, and is set back: files of the future change nothing."""

import os
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.cli import main as cli
from sidrec_torchrec.data.sid_manifest import Manifest
from sidrec_torchrec.files import read_object, write_json
from sidrec_torchrec.jobs import evaluate, train_ranker
from sidrec_torchrec.training.checkpoints import Checkpoints
from tests.jobs.test_train_ranker import make_config

FUTURE = 2_524_608_000  # January 2050


def as_of_the_future(*folders: Path) -> None:
    """As if all files had been written before the clock was set back."""
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (FUTURE, FUTURE))


class Killed(Exception):
    pass


def test_a_run_goes_on_and_ends_as_if_nobody_had_touched_the_clock(corpus, prepared, sids, tmp_path, monkeypatch):
    whole = train_ranker.main(make_config(corpus, prepared, sids, tmp_path / "whole", "side"))
    data, sequences = tmp_path / "data", tmp_path / "prepared"
    shutil.copytree(corpus, data)
    shutil.copytree(prepared, sequences)
    config = make_config(data, sequences, sids, tmp_path / "run", "side")

    def saved_then_killed(self, name, state):
        save(self, name, state)
        raise Killed

    save = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", saved_then_killed)
        train_ranker.main(config)
    as_of_the_future(data, sequences, config.out)
    assert train_ranker.main(config)["test"] == whole["test"]
    as_of_the_future(config.out)
    assert train_ranker.main(config)["test"] == whole["test"]  # read back
    assert evaluate.main(evaluate.EvaluateConfig(ranker=config.out))["ne_all"] == whole["test"]["ne_all"]


def test_what_changes_today_is_seen_beside_files_of_the_future(corpus, prepared, sids, tmp_path, capsys):
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(corpus, data)
    flags = ["train-ranker", "--data", data, "--prepared", prepared, "--arm", "none", "--out", out, "--epochs", "1"]
    flags = [*map(str, flags)]
    assert cli(flags) == 0
    as_of_the_future(data, out)
    items = pq.read_table(data / "items.parquet")
    pq.write_table(items.slice(1), data / "items.parquet")  # today: years before the run
    assert cli(flags) == 2
    assert "items.parquet" in capsys.readouterr().err


def test_generations_are_told_by_their_numbers_not_by_the_clock(corpus, sids, tmp_path):
    folder = tmp_path / "sids"
    shutil.copytree(sids["side"], folder)
    manifest = read_object(folder / "manifest.json")
    manifest.pop("sha256", None)
    manifest["generations"][0]["created"] = "2050-01-01T00:00:00+00:00"
    write_json(folder / "manifest.json", manifest, sealed=True)
    as_of_the_future(folder)
    items = pq.read_table(corpus / "items.parquet")
    place = items.schema.get_field_index("item_id")
    ids = pc.add(items["item_id"], pc.add(pc.max(items["item_id"]), 1))
    new = items.set_column(place, "item_id", ids).slice(0, 5)
    (tmp_path / "data").mkdir()
    pq.write_table(new, tmp_path / "data" / "items.parquet")
    tokenizer = sids["side"].parent / "tokenizers" / "side"
    flags = ["--data", tmp_path / "data", "--tokenizer", tokenizer, "--out", folder, "--append"]
    assert cli(["encode-corpus", *map(str, flags)]) == 0
    first, second = Manifest.read(folder).generations
    assert second.rows == 5 and second.created < first.created
