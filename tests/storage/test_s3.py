"""The store that S3 is: whole files or none, whatever its server does, and one line on what cannot be mended by trying again."""

import os
import socket
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.cli import main as cli
from sidrec_torchrec.errors import StorageError
from sidrec_torchrec.files import atomic_path, read_json, remove, sha256_of, write_json
from sidrec_torchrec.part_files import PartFiles, open_parquet
from sidrec_torchrec.storage import remote
from sidrec_torchrec.storage.mirror import bring, is_stand_in, local, open_input, slim
from sidrec_torchrec.storage.urls import place_of

CONTENT = os.urandom(3 << 20)


def test_half_of_the_requests_fail_and_nothing_but_time_is_lost(s3):
    s3.fails(0.5, seed=3)
    out = local(f"{s3.url}/out", is_output=True)
    table = pa.table({"a": range(100_000)})
    for number in range(4):
        with atomic_path(out / f"folder-{number}") as folder:
            folder.mkdir()
            (folder / "content.bin").write_bytes(CONTENT)
            pq.write_table(table, folder / "part.parquet", row_group_size=10_000)
            write_json(folder / "it.json", {"number": number}, sealed=True)
    remove(out / "folder-3")
    found = local(f"{s3.url}/out")
    assert sorted(path.name for path in found.iterdir()) == ["folder-0", "folder-1", "folder-2"]
    for number in range(3):
        folder = found / f"folder-{number}"
        assert sorted(path.name for path in folder.iterdir()) == ["content.bin", "it.json", "part.parquet"]
        assert read_json(folder / "it.json") == {"number": number}
        assert (folder / "content.bin").read_bytes() == CONTENT
        assert is_stand_in(folder / "part.parquet")
        with open_parquet(folder / "part.parquet") as file:
            assert file.read().equals(table)
        assert sha256_of(folder / "part.parquet") == sha256_of(out / f"folder-{number}" / "part.parquet")
    kinds = {request["status"][:3] for request in s3.log()}
    assert {"500", "503", "dro", "200"} <= kinds


def test_moves_whose_answers_are_lost_are_done_once(s3):
    parts = PartFiles.of(local(f"{s3.url}/out/x.parquet", is_output=True), "these inputs")
    for number in range(12):
        with parts.writing(number) as path, atomic_path(path) as file:
            pq.write_table(pa.table({"a": [number]}), file)
        parts.finish(number, {})
    s3.fails(0.5, seed=5)
    s3.log()
    parts.join(12)
    assert any(r["status"] == "dropped when done" and r["method"] == "PUT" for r in s3.log())
    s3.fails(0)
    found = local(f"{s3.url}/out")
    assert [path.name for path in found.iterdir()] == ["x.parquet"] and len([*found.glob("*/*")]) == 12
    for number in range(12):
        with open_parquet(found / "x.parquet" / f"part-{number:05}.parquet") as file:
            assert file.read()["a"].to_pylist() == [number]


def test_a_file_that_is_removed_while_it_is_read_is_missed_at_once(s3):
    write_json(local(f"{s3.url}/a.json", is_output=True), {"a": 1})
    place = place_of(local(f"{s3.url}/a.json"))
    file = remote.RemoteFile(place)
    remove(local(f"{s3.url}/a.json", is_output=True))
    with pytest.raises(FileNotFoundError, match=f"removed: '{s3.url}/a.json'"):
        file.read()


def test_a_file_is_read_by_ranges(s3):
    out = local(f"{s3.url}/big.parquet", is_output=True)
    with atomic_path(out) as file:
        pq.write_table(pa.table({"a": [os.urandom(1 << 20)], "b": [os.urandom(1 << 22)]}), file)
    slim(out)
    s3.log()
    path = local(f"{s3.url}/big.parquet")
    assert sum(request["bytes"] for request in s3.log()) == 0
    with open_parquet(path) as file:
        file.read(["a"])
    assert 1 << 20 < sum(request["bytes"] for request in s3.log()) < 3 << 20


def test_json_is_put_last_and_read_never_before_what_it_names(s3):
    out = local(f"{s3.url}/out", is_output=True)
    for _ in range(2):  # a new folder, and one that is replaced
        s3.log()
        with atomic_path(out / "codec") as folder:
            folder.mkdir()
            write_json(folder / "codec.json", {"a": 1}, sealed=True)
            (folder / "codec.pt").write_bytes(b"tensors")
        done = [
            (request["method"], request["path"].rpartition("/")[2])
            for request in s3.log()
            if request["method"] in ("PUT", "DELETE") and not request["path"].endswith("/")
        ]
        places = [done.index(step) for step in (("PUT", ".codec.partial"), ("PUT", "codec.pt"), ("PUT", "codec.json"))]
        assert places == sorted(places)
        assert done.index(("DELETE", ".codec.partial")) > places[-1]
    s3.ask(f"/{s3.bucket}/out/.codec.partial", "PUT")  # as if it had been killed while it replaced the folder
    assert not (local(f"{s3.url}/out") / "codec").exists()
    assert not local(f"{s3.url}/out/codec").exists()


def said(capsys, *arguments: str) -> str:
    assert cli([*arguments]) == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("error: ") and "a-secret-key" not in line and "an-access-key" not in line
    return line


def test_what_cannot_be_mended_is_said_at_once_and_in_a_line(s3, capsys, monkeypatch):
    begin = time.monotonic()
    validate = ("data", "validate", "--data")
    assert "s3://no-bucket-of-this-name/data: there is no bucket 'no-bucket-of-this-name'" in said(
        capsys, *validate, "s3://no-bucket-of-this-name/data"
    )
    assert "error: s3://another-bucket-that-is-not/out: there is no bucket" in said(
        capsys, "prepare", "--data", "x", "--out", "s3://another-bucket-that-is-not/out"
    )
    assert f"error: {s3.url}/data: no such folder" in said(capsys, *validate, f"{s3.url}/data")
    assert "a URL of s3:// with credentials" in said(capsys, *validate, "s3://an-access-key:a-secret-key@bucket/data")
    assert "nothing here reads URLs of gopher://" in said(capsys, *validate, "gopher://host/data")
    s3.denies()
    line = said(capsys, *validate, f"{s3.url}/data")
    assert f"error: {s3.url}/data: the store refuses it (" in line and "credentials" in line
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("url", ["s3://bucket/a?nonsense=1", "s3://a bucket/a", "s3://bucket/a?scheme=ftp"])
def test_a_url_that_arrow_does_not_take_is_not_laid_on_a_package_that_is_missing(s3, url):
    with pytest.raises(StorageError, match="nonsense|a bucket|ftp") as raised:
        local(url)
    assert "fsspec" not in str(raised.value) and len(str(raised.value).splitlines()) == 1


def test_a_server_that_is_gone_is_waited_for_only_so_long(s3, capsys, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
    monkeypatch.setenv("SIDREC_STORAGE_MINUTES", "0.02")
    remote._store.cache_clear()
    line = said(capsys, "data", "validate", "--data", f"{s3.url}/data")
    assert f"error: {s3.url}/data: tried " in line and "see that the store can be reached" in line


def test_an_upload_that_fails_for_good_leaves_what_was_there(s3, monkeypatch):
    out = local(f"{s3.url}/out", is_output=True)
    write_json(out / "a.json", {"a": 1}, sealed=True)
    s3.denies()
    with pytest.raises(StorageError, match=f"{s3.url}/out/a.json: the store refuses it"):
        write_json(out / "a.json", {"a": 2}, sealed=True)
    with socket.socket() as probe, monkeypatch.context() as patch:
        probe.bind(("127.0.0.1", 0))
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{probe.getsockname()[1]}")
        patch.setenv("SIDREC_STORAGE_MINUTES", "0.01")
        remote._store.cache_clear()
        with pytest.raises(StorageError, match=f"{s3.url}/out/a.json: tried"):
            write_json(out / "a.json", {"a": 2}, sealed=True)
    remote._store.cache_clear()
    s3.fails(0)
    assert read_json(local(f"{s3.url}/out/a.json")) == {"a": 1}
    assert read_json(bring(out, clean=True) / "a.json") == {"a": 1}


def test_a_name_that_leads_elsewhere_is_refused(s3, tmp_path):
    s3.ask(f"/{s3.bucket}/data/..%2F..%2F..%2Fx.json", "PUT")
    with pytest.raises(StorageError, match=f"{s3.url}/data: holds 'data/../../../x.json', a name with '..'"):
        local(f"{s3.url}/data")
    assert not [*tmp_path.rglob("x.json")]


def test_the_endpoint_may_be_in_the_url(s3, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    url = f"{s3.url}/out/a.bin?endpoint_override=127.0.0.1:{s3.port}&scheme=http"
    with atomic_path(local(url, is_output=True)) as file:
        file.write_bytes(b"content")
    with open_input(local(url)) as file:
        assert file.read() == b"content"


def test_a_pyarrow_that_cannot_put_by_one_request_puts_by_several(s3, monkeypatch):
    monkeypatch.setattr(remote, "_ONE_REQUEST", {"no_such_option": "true"})
    remote._store.cache_clear()
    write_json(local(f"{s3.url}/a.json", is_output=True), {"a": 1})
    assert read_json(local(f"{s3.url}/a.json")) == {"a": 1}
    remote._store.cache_clear()
