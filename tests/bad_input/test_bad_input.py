"""Every kind of bad input ends in one sentence and leaves all files as they were; docs/errors.md says the same."""

import os
import time
from collections import Counter

import pytest

from tests.bad_input.kinds import Folder, Kind, Whole, outcome, try_out
from tests.bad_input.spoils import column, parts
from tests.bad_input.table import DOCUMENT, KINDS, written


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return Whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kind(kind, whole, tmp_path):
    _, wrong = try_out(kind, whole, tmp_path / "folder")
    assert wrong == []


def test_a_kind_that_does_not_fall_is_seen(whole, tmp_path):
    fine = Kind("nothing wrong", "data validate --data {}/data", "wrong", column("data/items.parquet", "more", 1))
    _, wrong = try_out(fine, whole, tmp_path / "folder")
    assert len(wrong) == 3  # its exit code, its lines, its words
    writing = Kind("it writes", "prepare --data {}/data --out {}/out", "")
    assert "changed or left out, out/metrics.json" in str(try_out(writing, whole, tmp_path / "other")[1])


def test_the_document_says_what_is_said():
    assert DOCUMENT.read_text() == written(DOCUMENT.read_text()), "run python -m tests.bad_input.table"


def test_there_are_many_and_each_has_its_name():
    assert len(KINDS) >= 120
    assert [name for name, count in Counter(kind.name for kind in KINDS).items() if count > 1] == []


@pytest.mark.parametrize(
    "name", ["two words", "a.b.c", ".hidden", "new\nline", "\u00e9t\u00e9 \u732b", "per%cent", "$HOME", "-x"]
)
def test_folders_may_have_any_name(name, whole, tmp_path):
    folder = Folder(tmp_path, whole)
    (folder / "data").rename(tmp_path / name)
    code, said = outcome(["prepare", "--data", str(tmp_path / name), "--out", str(tmp_path / f"{name} out")])
    assert code == 0, said
    assert (tmp_path / f"{name} out" / "metrics.json").exists()


def test_neither_a_home_nor_the_right_time_is_needed(whole, tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME", "USER"):
        monkeypatch.delenv(name, raising=False)
    folder = Folder(tmp_path, whole)
    for file in (folder / "data").iterdir():
        os.utime(file, (time.time() + 1e9, time.time() + 1e9))  # the clock was set back since
    for _ in range(2):  # the second time it is read back
        code, said = outcome(["prepare", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
        assert code == 0, said


def test_parts_are_no_mistake_as_such(whole, tmp_path):
    folder = Folder(tmp_path, whole)
    parts(folder)
    (tmp_path / "data/events/1.parquet").unlink()
    assert outcome(["data", "validate", "--data", str(tmp_path / "data")])[0] == 0
