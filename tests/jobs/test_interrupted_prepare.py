"""A `prepare` that is killed goes on from the shares it has cut and the buckets it has written."""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data import prepare as prepare_module
from sidrec_torchrec.data import scatter
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.data.prepared import PREPARED_FILE
from sidrec_torchrec.data.scatter import EventCoder
from sidrec_torchrec.data.splits import BucketSequences
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.jobs import prepare
from sidrec_torchrec.jobs.prepare import PrepareJobConfig
from sidrec_torchrec.storage.mirror import BEGUN


@pytest.fixture(scope="module")
def log(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus in row groups, so that its log has shares, with a number to be predicted that few events have."""
    folder = tmp_path_factory.mktemp("log")
    for name in ("items.parquet", "users.parquet"):
        (folder / name).symlink_to(corpus / name)
    events = pq.read_table(corpus / "events.parquet")
    dwell = pa.array([place / 3 if place % 5 == 0 else None for place in range(len(events))])
    pq.write_table(events.append_column("dwell", dwell), folder / "events.parquet", row_group_size=len(events) // 6)
    return folder


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for constant in ("EVENTS_PER_BUCKET", "_LEAST_PER_BUCKET", "_EVENTS_PER_SHARE"):
            patch.setattr(scatter, constant, 400)
        yield


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, int]]:
    """A run that nobody touched: its folder, what it gave, and how often each step was called."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    with pytest.MonkeyPatch.context() as patch:
        counts = counted(patch)
        return folder, prepare.main(config_of(log, folder)), counts


def config_of(data: Path, out: Path) -> PrepareJobConfig:
    return PrepareJobConfig(data=data, out=out, protocol=PrepareConfig(tasks=("label", "dwell:log")))


def begun(out: Path) -> list[Path]:
    return [*out.glob(f".*{BEGUN}")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


STEPS = {
    "cut": (EventCoder, "__call__"),
    "written": (BucketSequences, "rows"),
}  # a call for each share; for each bucket


def counted(monkeypatch: pytest.MonkeyPatch, most: dict[str, int] | None = None) -> dict[str, int]:
    """Counts the calls of each step from now on; one more than ``most`` ends the process, as far as Python can tell."""
    counts = dict.fromkeys(STEPS, 0)

    def counting(step, original):
        def call(*arguments, **options):
            if counts[step] == (most or {}).get(step):
                raise KeyboardInterrupt
            counts[step] += 1
            return original(*arguments, **options)

        return call

    for step, (owner, name) in STEPS.items():
        monkeypatch.setattr(owner, name, counting(step, getattr(owner, name)))
    return counts


@pytest.mark.parametrize("most", [{"cut": 3}, {"written": 4}], ids=str)
def test_what_was_done_is_not_done_again(most, whole, log, tmp_path, monkeypatch):
    folder, result, counts = whole
    config = config_of(log, tmp_path / "out")
    with monkeypatch.context() as patch:
        done = counted(patch, most)
        with pytest.raises(KeyboardInterrupt):
            prepare.main(config)
    assert not (config.out / "sequences").exists() and len(begun(config.out)) == 1
    with monkeypatch.context() as patch:
        rest = counted(patch)
        assert prepare.main(config) == result
    assert done == {"cut": counts["cut"], "written": 0} | most
    assert {step: done[step] + rest[step] for step in STEPS} == counts
    assert files_of(config.out / "sequences") == files_of(folder / "sequences")
    assert not begun(config.out)


CUT, KNOWN, PART = "buckets/events-1-1.arrow", "written/train-1.arrow", "sequences/train/part-00001.parquet"


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *((name, harm) for name in (CUT, KNOWN, PART) for harm in ("cut", "gone")),
        *((name, "flipped") for name in (KNOWN, PART)),  # what is cut is known by its size alone
    ],
)
def test_what_was_done_and_harmed_is_done_again(name, harm, whole, log, tmp_path, monkeypatch):
    config = config_of(log, tmp_path / "out")
    with monkeypatch.context() as patch:
        counted(patch, {"written": 4})
        with pytest.raises(KeyboardInterrupt):
            prepare.main(config)
    (folder,) = begun(config.out)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content[: len(content) // 2] if harm == "cut" else content)
    if harm == "gone":
        (folder / name).unlink()
    assert prepare.main(config) == whole[1]
    assert files_of(config.out / "sequences") == files_of(whole[0] / "sequences")


def test_a_run_that_was_killed_in_its_last_moments_is_not_run_again(log, tmp_path, monkeypatch):
    config = config_of(log, tmp_path / "out")
    result = prepare.main(config)
    (config.out / "metrics.json").unlink()
    (config.out / f".mine{BEGUN}" / "buckets").mkdir(parents=True)
    monkeypatch.setattr(prepare, "prepare", None)
    assert prepare.main(config) == result
    assert not begun(config.out)


def test_files_that_a_kill_left_half_written_are_no_part_of_the_sequences(whole, log, tmp_path, monkeypatch):
    config = config_of(log, tmp_path / "out")

    def killed(folder: Path) -> None:
        (folder / f".{PREPARED_FILE}.host-1-{16 * '0'}.tmp").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "list_files", killed)
        prepare.main(config)
    prepare.main(config)
    assert files_of(config.out / "sequences") == files_of(whole[0] / "sequences")


def test_a_kill_while_what_is_known_of_the_buckets_is_removed(whole, log, tmp_path, monkeypatch):
    """Some of it is gone then, and some there, which must not be gone on from."""
    config = config_of(log, tmp_path / "out")

    def killed(folder: Path) -> None:
        for index in folder.glob("*.arrow"):
            index.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        prepare.main(config)
    prepare.main(config)
    assert files_of(config.out / "sequences") == files_of(whole[0] / "sequences")
    assert not begun(config.out)


def test_a_log_that_is_refused_leaves_nothing(log, tmp_path):
    """So that its folder can be used for another."""
    broken, out = tmp_path / "data", tmp_path / "out"
    broken.mkdir()
    for name in ("items.parquet", "users.parquet"):
        (broken / name).symlink_to(log / name)
    events = pq.read_table(log / "events.parquet")
    items = events["item_id"].to_pylist()
    items[-1] = 10**6
    place = events.schema.get_field_index("item_id")
    pq.write_table(
        events.set_column(place, "item_id", pa.array(items)), broken / "events.parquet", row_group_size=len(events) // 6
    )
    with pytest.raises(DataError, match="row"):
        prepare.main(config_of(broken, out))
    assert not out.exists()


SCRIPT = """
import sys
from pathlib import Path
from sidrec_torchrec.data import scatter
from sidrec_torchrec.data.prepare import PrepareConfig
from sidrec_torchrec.jobs.prepare import PrepareJobConfig, main

if __name__ == "__main__":
    data, out = map(Path, sys.argv[1:])
    for constant in ("EVENTS_PER_BUCKET", "_LEAST_PER_BUCKET", "_EVENTS_PER_SHARE"):
        setattr(scatter, constant, 400)
    main(PrepareJobConfig(data=data, out=out, protocol=PrepareConfig(tasks=("label", "dwell:log"))))
"""


def test_killed_again_and_again_it_ends_as_if_never(whole, log, tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT)
    out = tmp_path / "out"
    marks = [f".*{BEGUN}/{name}.json" for name in ("buckets/share-2", "written/1", "written/5")] + ["metrics.json"]
    kills = 0
    for mark in marks:
        process = subprocess.Popen([sys.executable, str(tmp_path / "job.py"), str(log), str(out)])
        while process.poll() is None and (mark == marks[-1] or not any(out.glob(mark))):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() != 0
    assert process.returncode == 0 and kills
    assert files_of(out / "sequences") == files_of(whole[0] / "sequences")
    assert {path.name for path in out.iterdir()} == {path.name for path in whole[0].iterdir()}
