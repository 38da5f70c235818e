"""Output folders: one job at a time, one configuration, and claims that refused jobs take back."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from sidrec_torchrec.errors import DataError, FolderBusyError, RunMismatchError
from sidrec_torchrec.training.config import config_from_json, config_json
from sidrec_torchrec.training.group import process_group
from sidrec_torchrec.training.runs import open_run

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("process 7 on host", file=file, flush=True)
print("held", flush=True)
time.sleep(600)
"""

WITH_A_WORKER = """
import os, sys, time
from pathlib import Path
from sidrec_torchrec.training.runs import _locked
with _locked(Path(sys.argv[1])):
    worker = os.fork()
    if not worker:
        os.close(1)
        time.sleep(600)
    time.sleep(0.5)
    print(worker, flush=True)
    time.sleep(600)
"""

JOIN = """
from sidrec_torchrec.training.config import config_from_json, config_json
from sidrec_torchrec.training.group import process_group
with process_group() as processes:
    assert processes.world_size == 1
"""


@dataclass(frozen=True)
class Config:
    out: Path
    epochs: int = 1


def work(config: Config) -> dict:
    with process_group(), open_run(config.out, config) as run:
        return run.result or run.finish({"epochs": config.epochs, "shape": (1, 2)})


def test_a_finished_run_is_read_back(tmp_path):
    config = Config(tmp_path / "run")
    first = work(config)
    assert first == work(config) == {"epochs": 1, "shape": [1, 2]}
    with pytest.raises(RunMismatchError, match="epochs was 1, is 2"):
        work(replace(config, epochs=2))


def test_a_group_of_one_leaves_nothing_that_children_inherit(tmp_path):
    before = dict(os.environ), sys.excepthook
    with process_group() as processes:
        assert (processes.rank, processes.world_size) == (0, 1)
        assert (dict(os.environ), sys.excepthook) == before
        subprocess.run([sys.executable, "-c", JOIN], check=True)  # a group of its own, at the same time


def test_a_second_job_in_the_folder_is_refused_until_the_first_has_ended(tmp_path):
    config = Config(tmp_path / "run")
    with process_group():
        with open_run(config.out, config):
            with pytest.raises(FolderBusyError, match="run: process .* is working in it"):
                work(config)
            work(Config(tmp_path / "run" / "part"))  # a folder of its own
        work(config)


def test_the_lock_of_a_killed_job_is_gone(tmp_path):
    config = Config(tmp_path / "run")
    config.out.mkdir()
    command = [sys.executable, "-c", HOLD, str(config.out / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderBusyError, match="process 7 on host is working in it; wait"):
            work(config)
        other.kill()
    assert work(config)["epochs"] == 1


def test_a_worker_that_outlives_its_killed_job_does_not_keep_the_lock(tmp_path):
    config = Config(tmp_path / "run")
    command = [sys.executable, "-c", WITH_A_WORKER, str(config.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as job:
        worker = int(job.stdout.readline())
        with pytest.raises(FolderBusyError):  # the worker has closed the lock, and not let go of it
            work(config)
        job.kill()
    try:
        assert work(config)["epochs"] == 1
        os.kill(worker, 0)  # lives on
    finally:
        os.kill(worker, signal.SIGKILL)


def test_what_a_killed_job_was_writing_is_removed(tmp_path):
    config = Config(tmp_path / "run")
    claim, sequences = config.out / ".run.json.7.tmp", config.out / ".sequences.host-7-0123456789abcdef.tmp"
    config.out.mkdir()
    claim.touch()  # by a job killed at its very start
    with process_group():
        with open_run(config.out, config):
            assert not claim.exists()
            sequences.mkdir()
            (sequences / "part").touch()
            with pytest.raises(FolderBusyError):
                work(config)
            assert sequences.exists()  # of a job at work: not another's to remove
        with pytest.raises(RunMismatchError):
            work(replace(config, epochs=2))
        assert sequences.exists()  # of another run
    assert work(config)["epochs"] == 1
    assert not sequences.exists()


def test_nothing_is_removed_from_a_folder_of_something_else(tmp_path):
    theirs = tmp_path / ".cache.1.tmp"
    theirs.touch()
    with pytest.raises(RunMismatchError, match="holds files of something else"):
        work(Config(tmp_path))
    assert theirs.exists()


def test_a_folder_that_cannot_be_written_to_is_still_read(tmp_path):
    config = Config(tmp_path / "run")
    work(config)
    (config.out / "run.lock").mkdir()  # cannot be opened, whoever asks
    assert work(config)["epochs"] == 1


def test_a_refused_job_takes_its_claim_back_but_not_one_that_has_written(tmp_path):
    config = Config(tmp_path / "run")

    def refused(config: Config, file: str | None = None) -> None:
        with process_group(), open_run(config.out, config) as run:
            if file is not None:
                (run.folder / file).touch()
            raise DataError("no such column")

    with pytest.raises(DataError, match="no such column"):
        refused(config)
    with pytest.raises(DataError, match="no such column"):
        refused(replace(config, epochs=2), "checkpoint")
    with pytest.raises(RunMismatchError, match="epochs was 2, is 3"):
        work(replace(config, epochs=3))


def test_all_processes_learn_of_a_refusal(run_distributed, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert run_distributed(_refusal, 2, tmp_path / "mine") == ["holds files of something else"] * 2


def _refusal(folder: Path) -> str:
    with (
        pytest.raises(RunMismatchError, match="holds files of something else") as error,
        open_run(folder, Config(folder)),
    ):
        pass
    return str(error.value).partition(": ")[2].partition(";")[0]


@dataclass(frozen=True)
class Reading:
    out: Path
    data: Path
    epochs: int = 1


def read(config: Reading) -> dict:
    with process_group(), open_run(config.out, config, inputs=[config.data / "a", config.data / "b"]) as run:
        return run.result or run.finish({"text": (config.data / "a").read_text()})


def test_inputs_count_by_content_and_not_by_place(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "a").write_text("one")
    assert read(Reading(out, data)) == {"text": "one"}
    shutil.copytree(data, tmp_path / "copy")
    shutil.copytree(out, tmp_path / "moved")
    assert read(Reading(tmp_path / "moved", tmp_path / "copy")) == {"text": "one"}
    times = (data / "a").stat()
    (data / "a").write_text("two")  # of the same size
    os.utime(data / "a", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    with pytest.raises(RunMismatchError, match=r"made from other inputs \(.*data/a has changed\)"):
        read(Reading(out, data))
    os.utime(data / "a", ns=(times.st_atime_ns, times.st_mtime_ns))  # as rsync sets it
    with pytest.raises(RunMismatchError, match=r"made from other inputs \(.*data/a has changed\)"):
        read(Reading(out, data))
    (tmp_path / "copy" / "b").touch()
    with pytest.raises(RunMismatchError, match="copy/b is there now"):
        read(Reading(out, tmp_path / "copy"))
    (data / "a").unlink()
    with pytest.raises(RunMismatchError, match="data/a is gone"):
        read(Reading(out, data))


def test_a_moved_run_finds_what_moved_with_it_and_what_stayed(tmp_path):
    for name in ("data", "elsewhere"):
        (tmp_path / "one" / name).mkdir(parents=True)
    config = Reading(tmp_path / "one" / "out", tmp_path / "one" / "data")
    kept = config_json(config, config.out)
    (tmp_path / "one").rename(tmp_path / "two")
    assert config_from_json(Reading, kept, tmp_path / "two" / "out").data == tmp_path / "two" / "data"
    config = Reading(tmp_path / "two" / "out", tmp_path / "two" / "data")
    assert config_from_json(Reading, config_json(config, config.out), tmp_path / "far" / "out").data == config.data


def test_neither_a_finished_nor_a_refused_run_leaves_a_lock(tmp_path):
    config = Config(tmp_path / "run")
    work(config)
    with pytest.raises(RunMismatchError):
        work(replace(config, epochs=2))
    assert sorted(path.name for path in config.out.iterdir()) == ["metrics.json", "run.json"]

    with pytest.raises(DataError), process_group(), open_run(tmp_path / "a" / "b", Config(tmp_path / "a" / "b")):
        raise DataError("no such column")
    assert not (tmp_path / "a").exists()  # which it had made


def test_a_finished_run_says_that_it_is(tmp_path, capsys):
    config = Config(tmp_path / "run")
    work(config)
    assert capsys.readouterr().err == ""
    work(config)
    assert "run: finished before; its result is read back" in capsys.readouterr().err
