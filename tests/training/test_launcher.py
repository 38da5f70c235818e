"""What TorchX's trackers are told: of a run, of the steps of one, and that a tracker which fails ends nothing."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from torchx.tracker.api import AppRun
from torchx.tracker.backend.fsspec import create

from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.runs import open_run


@dataclass(frozen=True)
class Config:
    out: Path


RESULT = {"arm": "side", "test": {"ne_all": 0.75, "per": {"day": 1}}, "losses": [1.0, 0.5], "best": None}


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Environment variables as the launcher sets them, with its tracker's file of settings."""
    (tmp_path / "tracked").mkdir()
    settings = tmp_path / "tracker.conf"
    settings.write_text(f"protocol=file\nroot_path={tmp_path / 'tracked'}\n")
    monkeypatch.setenv("TORCHX_JOB_ID", "local_cwd://torchx/job-1")
    monkeypatch.setenv("TORCHX_TRACKERS", "fsspec")
    monkeypatch.setenv("TORCHX_TRACKER_FSSPEC_CONFIG", str(settings))
    AppRun.run_from_env.cache_clear()
    yield settings
    AppRun.run_from_env.cache_clear()


def work(out: Path) -> None:
    with process_group(), open_run(out, Config(out)) as run:
        run.finish(RESULT)


def test_numbers_and_texts_by_name_and_where_the_file_is(launched, tmp_path):
    work(tmp_path / "run")
    tracker = create(str(launched))
    assert list(tracker.run_ids()) == ["local_cwd://torchx/job-1"]
    assert tracker.metadata("local_cwd://torchx/job-1") == {"arm": "side", "test.ne_all": 0.75, "test.per.day": 1}
    (artifact,) = tracker.artifacts("local_cwd://torchx/job-1").values()
    assert (artifact.name, artifact.path) == ("metrics.json", str(tmp_path / "run" / "metrics.json"))


def test_steps_of_a_run_go_by_their_folders(launched, tmp_path):
    with process_group(), open_run(tmp_path / "run", Config(tmp_path / "run")):
        for seed in range(2):
            work(tmp_path / "run" / "rankers" / f"seed-{seed}")
    tracker = create(str(launched))
    names = set(tracker.metadata("local_cwd://torchx/job-1"))
    assert {"rankers/seed-0/test.ne_all", "rankers/seed-1/arm"} <= names and len(names) == 6
    assert set(tracker.artifacts("local_cwd://torchx/job-1")) == {f"rankers/seed-{n}/metrics.json" for n in range(2)}


def test_a_tracker_that_fails_is_warned_of_and_ends_nothing(launched, tmp_path, capsys):
    launched.unlink()
    work(tmp_path / "run")
    assert (tmp_path / "run" / "metrics.json").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: TORCHX_TRACKERS=fsspec: ") and "tracker.conf" in line


def test_without_a_launcher_torchx_is_not_even_imported(monkeypatch, tmp_path):
    monkeypatch.delenv("TORCHX_TRACKERS", raising=False)
    monkeypatch.setitem(sys.modules, "torchx.tracker", None)  # importing it would raise
    work(tmp_path / "run")


def told_by(folder: Path) -> int:
    """On every process: all ask for the trackers, one tells them."""
    with open_run(folder / "run", Config(folder / "run")) as run:
        run.finish(RESULT)
    return len(list(create(str(folder / "tracker.conf"))._load("local_cwd://torchx/job-1", "metadata")))


def test_of_two_processes_one_tells(launched, tmp_path, run_distributed):
    assert run_distributed(told_by, 2, tmp_path) == [1, 1]
