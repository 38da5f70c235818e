"""Engines: the results of the function, in order; what it raised; nothing that waits for ever."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data import features, scatter, tally
from sidrec_torchrec.data import prepare as prepare_module
from sidrec_torchrec.data.folder import DataFolder, DataSchema
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.splits import SPLITS
from sidrec_torchrec.engines.base import ENGINES, Inline, open_engine
from sidrec_torchrec.engines.local import LocalEngine
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.jobs import data_validate
from tests.data.test_prepare import write_corpus

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")
ALL = ["inline", "local", pytest.param("ray", marks=needs_ray)]


def made(name: str):
    return Inline() if name == "inline" else LocalEngine(2) if name == "local" else ENGINES[name]()


@dataclass(frozen=True)
class Power:
    """Slower for small numbers, so that results come back out of order."""

    exponent: int

    def __call__(self, base: int) -> tuple[int, int]:
        time.sleep(0.05 / (1 + base))
        if base == 13:
            raise DataError("base 13: an unlucky number; leave it out")
        return base**self.exponent, os.getpid()


class Opened:
    """Says in which process it was opened, and how often."""

    count = 0

    @cached_property
    def _here(self) -> int:
        Opened.count += 1
        return os.getpid()

    def __call__(self, _: int) -> tuple[int, int]:
        time.sleep(0.05)
        return self._here, Opened.count


def group_of(_: int) -> list[str | None]:
    return [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]


def gathered(count: int) -> list[int]:
    """On each process of a group."""
    engine = open_engine(None)
    assert engine.for_little() is engine
    return [base for base, _ in engine.map(Power(1), range(count))]


def fail_or_sleep(item: int) -> None:
    if item == 1:
        raise DataError("an unlucky number")
    time.sleep(600 * (item > 1))


def die(_: int) -> None:
    os._exit(9)


@pytest.mark.parametrize("name", ALL)
def test_results_come_in_order(name):
    with closing(made(name)) as engine:
        results = list(engine.map(Power(3), range(12)))
        assert [value for value, _ in results] == [base**3 for base in range(12)]
        processes = {pid for _, pid in results}
        assert processes == {os.getpid()} if name == "inline" else os.getpid() not in processes
        assert [value for value, _ in engine.map(Power(2), [3, 4])] == [9, 16]  # other work, the same processes


@pytest.mark.parametrize("name", ALL)
def test_what_the_work_loads_is_loaded_once_a_process(name):
    with closing(made(name)) as engine:
        opened = dict(engine.map(Opened(), range(12)))
    assert set(opened.values()) == {1} and len(opened) <= 2


@pytest.mark.parametrize("name", ALL[1:])
def test_its_processes_are_none_of_torchruns(name, monkeypatch):
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "1")
    with closing(made(name)) as engine:
        assert list(engine.map(group_of, range(2))) == [[None] * 3] * 2


def checked(data: Path) -> tuple[dict, int, str]:
    """What a process says of the data, how many shares of the events it counts, and what it prints."""
    counted, printed, count = [], StringIO(), tally._Share.__call__
    tally._PER_SHARE = 200
    tally._Share.__call__ = lambda self, share: (counted.append(share), count(self, share))[1]
    with redirect_stdout(printed):
        summary = data_validate.main(data_validate.DataValidateConfig(data=data))
    return summary, len(counted), printed.getvalue()


def test_processes_of_torchrun_check_a_share_each(tmp_path, run_distributed):
    table = write_corpus(tmp_path / "data", users=60)
    pq.write_table(table, tmp_path / "data" / "events.parquet", row_group_size=len(table) // 6)
    (first, counted, printed), (second, others, silent) = run_distributed(checked, 2, tmp_path / "data")
    assert first == second and first["events"] == len(table)
    assert abs(counted - others) <= 1 and counted + others > 4
    assert "valid" in printed and not silent


@pytest.mark.parametrize("count", [0, 2, 5])
def test_processes_of_torchrun_share_the_work(count, run_distributed):
    assert run_distributed(gathered, 2, count) == [list(range(count))] * 2


@pytest.mark.parametrize("name", ALL)
def test_what_it_raises_is_raised_here(name):
    with closing(made(name)) as engine, pytest.raises(DataError, match="base 13: an unlucky number"):
        list(engine.map(Power(3), range(40)))


def test_pieces_at_hand_are_given_up_when_one_fails():
    with closing(LocalEngine(2)) as engine:
        begin = time.monotonic()
        with pytest.raises(DataError, match="an unlucky number"):
            list(engine.map(fail_or_sleep, range(8)))
        assert time.monotonic() - begin < 120
        assert [value for value, _ in engine.map(Power(1), range(4))] == [0, 1, 2, 3]


@needs_ray
def test_an_actor_that_is_killed_is_an_error(monkeypatch):
    monkeypatch.setattr("sidrec_torchrec.engines.ray._AGAIN", 0)  # starts of processes that die take their time
    gone = "a process of the Ray cluster is gone: "
    with closing(ENGINES["ray"]()) as engine, pytest.raises(SidrecError, match=gone):
        list(engine.map(die, range(4)))


def test_an_engine_that_there_is_not_is_named():
    with pytest.raises(SidrecError, match="unknown engine 'flink'; there are "):
        open_engine("flink")


def test_a_process_that_is_killed_is_an_error():
    with closing(LocalEngine(2)) as engine:
        with pytest.raises(
            SidrecError, match="a process that worked on a part is gone; if the machine ran out of memory"
        ):
            list(engine.map(die, range(4)))
        assert [value for value, _ in engine.map(Power(1), range(4))] == [0, 1, 2, 3]  # the next call starts anew


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(tmp_path, number):
    """Of a command, or by Ctrl-C, which all of them get, also those that wait: they say nothing, and begin nothing more."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, time\nfrom contextlib import closing\nfrom sidrec_torchrec import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what a shell's background job ignores
        "from sidrec_torchrec.engines.local import LocalEngine\n"
        "def work(item):\n    print(os.getpid(), flush=True)\n    time.sleep(600)\n"
        "def call(*_, **__):\n    with closing(LocalEngine(3)) as engine:\n        list(engine.map(work, range(2)))\n"
        "if __name__ == '__main__':\n    cli.call = call\n    raise SystemExit(cli.main(['prepare']))\n"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root), "TMPDIR": str(tmp_path)},
        start_new_session=True,
    )
    children = [int(parent.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)
        assert parent.communicate(timeout=60) == ("", "error: interrupted\n") and parent.returncode == 130
    else:
        parent.kill()
        parent.communicate()
    assert [*tmp_path.iterdir()] == [script]
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline, "a process outlived its parent"
        time.sleep(0.1)


@pytest.mark.parametrize("name", ALL[1:])
def test_sequences_are_the_same_whatever_prepares_them(name, tmp_path, monkeypatch):
    table = write_corpus(tmp_path / "data", users=60, labels=False)
    drawn = np.random.default_rng(0).integers(5, size=len(table))
    table = table.append_column("device", pa.array([f"d{n}" for n in drawn])).append_column(
        "dwell", pa.array(drawn / 3)
    )
    pq.write_table(table, tmp_path / "data" / "events.parquet", row_group_size=len(table) // 5)
    monkeypatch.setattr(features, "_SAMPLE", 500)
    data = DataFolder(tmp_path / "data", DataSchema(event_features=("device",), history_features=("dwell",)))
    for module, constant in (
        (scatter, "EVENTS_PER_BUCKET"),
        (scatter, "_LEAST_PER_BUCKET"),
        (scatter, "_EVENTS_PER_SHARE"),
    ):
        monkeypatch.setattr(module, constant, 200)
    monkeypatch.setattr(prepare_module, "_SMALL", 0)
    alone = prepare(data, tmp_path / "alone", PrepareConfig())
    with closing(made(name)) as engine:
        shared = prepare(data, tmp_path / "shared", PrepareConfig(), engine=engine)
    names = [sorted(path.relative_to(p.folder) for path in p.folder.rglob("*")) for p in (alone, shared)]
    assert names[0] == names[1] and sum(path.suffix == ".parquet" for path in names[0]) > 3 * len(SPLITS)
    for path in names[0]:
        if (alone.folder / path).is_file():
            assert (alone.folder / path).read_bytes() == (shared.folder / path).read_bytes(), path


def test_bad_rows_are_named_by_their_place_in_the_file(tmp_path, monkeypatch):
    """Whichever share meets them first."""
    write_corpus(tmp_path / "data", users=60)
    table = pq.read_table(tmp_path / "data" / "events.parquet")
    items = table["item_id"].to_pylist()
    for row in (len(items) // 2, len(items) - 1):
        items[row] = 10**6
    table = table.set_column(table.schema.get_field_index("item_id"), "item_id", pa.array(items))
    pq.write_table(table, tmp_path / "data" / "events.parquet", row_group_size=len(table) // 5)
    monkeypatch.setattr(scatter, "_EVENTS_PER_SHARE", 200)
    monkeypatch.setattr(prepare_module, "_SMALL", 0)
    with closing(LocalEngine(2)) as engine, pytest.raises(DataError, match=rf"row {len(items) // 2}: "):
        prepare(tmp_path / "data", tmp_path / "out", PrepareConfig(), engine=engine)
    assert not (tmp_path / "out").exists()
