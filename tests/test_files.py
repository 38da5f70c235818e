"""Whole files or none, whoever else writes, and on the disk before they have their name."""

import os
import socket

import pytest

from sidrec_torchrec.errors import DataError
from sidrec_torchrec.files import atomic_path, check_listed, list_files, read_json, remove_temporaries, write_json


def test_two_containers_with_one_process_id_write_a_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(socket, "gethostname", lambda: "worker")
    path = tmp_path / "result"
    with atomic_path(path) as first:
        first.write_text("half of the fi")
        with atomic_path(path) as second:
            second.write_text("the second")
        assert path.read_text() == "the second"
        first.write_text("the first, whole")
    assert path.read_text() == "the first, whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("is_folder", [False, True])
def test_content_is_on_the_disk_before_its_name_is(is_folder, tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    def noted_replace(old, new):
        done.append("renamed")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_path(tmp_path / "result") as temporary:
        if is_folder:
            temporary.mkdir()
            (temporary / "part").write_text("content")
        else:
            temporary.write_text("content")
    before = ["part", temporary.name] if is_folder else [temporary.name]
    assert done == [*before, "renamed", tmp_path.name]


def test_a_long_name_leaves_room_for_the_temporary_ones(tmp_path):
    path = tmp_path / ("n" * 255)
    with atomic_path(path) as temporary:
        temporary.touch()
    assert path.exists()


def test_only_temporaries_are_removed(tmp_path):
    with atomic_path(tmp_path / "a.b") as temporary:
        temporary.touch()
    (tmp_path / "a.b").unlink()
    name = temporary.name
    dead = [name, ".run.json.7.tmp", ".sequences.12.tmp"]
    others = [".cache.tmp", ".a.tmp", "run.json.7.tmp", ".x.y-7-12.tmp", name.removesuffix(".tmp")]
    for file in (*dead, *others):
        (tmp_path / file).touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_json_holds_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1.5, float("nan"), (float("inf"),)], "y": 1})
    assert read_json(tmp_path / "a.json") == {"x": [1.5, None, [None]], "y": 1}


def test_any_bit_flipped_in_a_sealed_file_is_noticed(tmp_path):
    path, value = tmp_path / "a.json", {"a": [1, 0.25, -0.0, "e\u0301"], "b": {"c": None}}
    write_json(path, value, sealed=True)
    assert read_json(path) == value
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"a\.json: not (what was written|JSON)"):
            read_json(path)


def test_files_are_compared_with_the_list_of_their_folder(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"1234")
    list_files(tmp_path)
    check_listed(tmp_path / "a")
    check_listed(tmp_path / "not there")
    (tmp_path / "b").write_bytes(b"of somebody else")
    check_listed(tmp_path / "b")
    (tmp_path / "a").write_bytes(b"1235")
    with pytest.raises(DataError, match="a: not what was written"):
        check_listed(tmp_path / "a")
    monkeypatch.setenv("SIDREC_VERIFY", "off")
    check_listed(tmp_path / "a")
