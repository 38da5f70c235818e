"""Mirrors of folders of this disk, by ``file://``: the code that S3 goes through, without a server."""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.parquet import ParquetTable
from sidrec_torchrec.errors import DataError, RunMismatchError, StorageError
from sidrec_torchrec.files import atomic_path, glance, list_files, read_json, remove, sha256_of, write_json
from sidrec_torchrec.files import check_listed as check
from sidrec_torchrec.part_files import PartFiles
from sidrec_torchrec.processes import made_once
from sidrec_torchrec.storage import mirror as mirror_module
from sidrec_torchrec.storage import remote
from sidrec_torchrec.storage.mirror import bring, is_stand_in, listed, local, open_input, size_of, slim
from sidrec_torchrec.storage.urls import made_beside
from sidrec_torchrec.training import runs
from sidrec_torchrec.training.group import process_group


@dataclass(frozen=True)
class Cores:
    """A job's config."""

    cores: int = 1


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a file of each sort, which is at ``url(there)``."""
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "mirrors"))
    folder = tmp_path / "there"
    (folder / "deep").mkdir(parents=True)
    pq.write_table(pa.table({"a": range(1000)}), folder / "deep" / "a.parquet")
    (folder / "b.npy").write_bytes(b"array")
    write_json(folder / "c.json", {"c": 1}, sealed=True)
    list_files(folder)
    return folder


def url(path: Path) -> str:
    return f"file://{path}"


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_small_files_are_brought_and_large_ones_read_where_they_are(there):
    mirror = local(url(there))
    assert names(mirror) == names(there) == ["b.npy", "c.json", "deep/a.parquet", "files.json"]
    path = mirror / "deep" / "a.parquet"
    assert (mirror / "b.npy").read_bytes() == b"array" and path.stat().st_size == 0 and is_stand_in(path)
    original = there / "deep" / "a.parquet"
    assert size_of(path) == original.stat().st_size and sha256_of(path) == sha256_of(original)
    with open_input(path) as content:
        assert content.read() == original.read_bytes()
    for file in names(mirror):
        check(mirror / file)
    table = ParquetTable.open(path)
    (row, batch), *_ = pickle.loads(pickle.dumps(table)).batches(["a"], 10)  # as it travels to a worker
    assert row == 0 and batch.column("a").to_pylist() == [*range(10)]


def test_a_bucket_of_all_sorts_is_not_fetched(there, monkeypatch):
    monkeypatch.setattr(mirror_module, "_MOST_FILES", 2)
    with pytest.raises(
        StorageError, match="more than 2 files to be fetched; name a folder of what this job reads alone"
    ):
        local(url(there))  # b.npy, c.json and files.json
    assert names(local(url(there / "deep"))) == ["a.parquet"]


def test_what_has_changed_there_is_brought_again_and_what_has_gone_goes(there):
    mirror = local(url(there))
    before = glance(mirror / "deep" / "a.parquet")
    assert glance(local(url(there)) / "deep" / "a.parquet") == before
    pq.write_table(pa.table({"a": range(10)}), there / "deep" / "a.parquet")
    os.utime(there / "deep" / "a.parquet", (1, 1))
    (there / "b.npy").unlink()
    write_json(there / "c.json", {"c": 2}, sealed=True)
    (mirror / "left").mkdir()
    mirror = local(url(there))
    assert names(mirror) == ["c.json", "deep/a.parquet", "files.json"] and not (mirror / "left").exists()
    assert read_json(mirror / "c.json") == {"c": 2}
    assert glance(mirror / "deep" / "a.parquet") != before
    with pytest.raises(DataError, match=f"{url(there)}/deep/a.parquet: not what was written"):
        ParquetTable.open(mirror / "deep" / "a.parquet")
    (there / "files.json").unlink()
    assert ParquetTable.open(local(url(there)) / "deep" / "a.parquet").num_rows == 10


def test_globs_and_partitions(there, tmp_path):
    for day in (1, 2):
        (there / f"log/day={day}").mkdir(parents=True)
        pq.write_table(pa.table({"a": [day] * 3}), there / f"log/day={day}" / "x.parquet")
    for typed in (f"{url(there)}/log", f"{url(there)}/log/day=*/x.parquet", f"{url(there)}/log/*"):
        table = ParquetTable.open(local(typed))
        rows = [batch.to_pydict() for _, batch in table.batches(["a", "day"], 10)]
        assert rows == [{"a": [1] * 3, "day": [1] * 3}, {"a": [2] * 3, "day": [2] * 3}]


def test_an_input_is_not_written_into(there):
    mirror = local(url(there))
    with pytest.raises(StorageError, match=f"{url(there)}/new.json: is an input"):
        write_json(mirror / "new.json", {})
    assert not (there / "new.json").exists()


def test_what_is_committed_is_there_and_what_is_removed_is_not(there, tmp_path):
    out = local(url(tmp_path / "out"), is_output=True)
    write_json(out / "a.json", {"a": 1}, sealed=True)
    with pytest.raises(ZeroDivisionError), atomic_path(out / "half") as folder:
        folder.mkdir()
        write_json(folder / "x.json", {})
        assert names(tmp_path / "out") == ["a.json"]
        1 / 0  # noqa: B018
    with atomic_path(out / "whole") as folder:
        folder.mkdir()
        (folder / "x.safetensors").write_bytes(b"tensors")
        write_json(folder / "x.json", {})
    assert names(tmp_path / "out") == ["a.json", "whole/x.json", "whole/x.safetensors"]
    with atomic_path(out / "whole") as folder:
        folder.mkdir()
        (folder / "y.safetensors").write_bytes(b"others")
    assert names(tmp_path / "out") == ["a.json", "whole/y.safetensors"]
    slim(out)
    assert (out / "whole" / "y.safetensors").stat().st_size == 0
    with open_input(out / "whole" / "y.safetensors") as content:
        assert content.read() == b"others"
    remove(out / "whole")
    assert names(tmp_path / "out") == ["a.json"]


def test_on_another_machine_what_is_there_is_all_that_counts(tmp_path, there):
    out = local(url(there), is_output=True)
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "never-put.bin").touch()
    (out / "run.lock").touch()
    bring(out, clean=True)
    assert names(out) == ["b.npy", "c.json", "deep/a.parquet", "files.json", "run.lock"]
    (out / "deep" / "new.bin").touch()
    bring(out)  # another process of the job may be about to put it
    assert (out / "deep" / "new.bin").exists()
    for path in there.rglob("*"):
        if path.is_file():
            path.unlink()
    bring(out, clean=True)
    assert names(out) == ["run.lock"]


def test_a_folder_that_was_killed_while_it_was_put_is_none(tmp_path, there, monkeypatch):
    out = local(url(tmp_path / "out"), is_output=True)
    put, left = remote.Store.put, [3]

    def killed(self, path, place):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return put(self, path, place)

    def write(text: str) -> None:
        with atomic_path(out / "folder") as folder:
            folder.mkdir()
            for name in ("a.bin", "b.bin"):
                (folder / name).write_text(text)
            write_json(folder / "c.json", {"text": text}, sealed=True)

    write("before")
    monkeypatch.setattr(remote.Store, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        write("after")
    monkeypatch.undo()
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "elsewhere"))
    assert names(local(url(tmp_path / "out"))) == [] and not local(url(tmp_path / "out" / "folder")).exists()
    out = bring(local(url(tmp_path / "out"), is_output=True), clean=True)
    write("again")
    assert names(tmp_path / "out") == ["folder/a.bin", "folder/b.bin", "folder/c.json"]
    assert names(local(url(tmp_path / "out"))) == names(tmp_path / "out")


def test_parts_are_taken_over_and_joined_by_another_machine(tmp_path, there, monkeypatch):
    def parts() -> PartFiles:
        return PartFiles.of(local(url(tmp_path / "out" / "x.parquet"), is_output=True), "these inputs")

    def write(number: int) -> None:
        with parts().writing(number) as path, atomic_path(path) as file:
            pq.write_table(pa.table({"a": [number]}), file)
        parts().finish(number, {"number": number})

    others = PartFiles.of(parts().path, "other inputs")
    with others.writing(0) as path, atomic_path(path) as file:
        file.write_bytes(b"of others")
    write(0)
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "elsewhere"))
    parts().begin()
    with atomic_path(parts().scratch / "scores.bin") as file:
        file.write_bytes(b"of this machine")
    assert listed(parts().path.parent, ".x*") == [parts().folder, parts().scratch]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [parts().folder.name]
    assert parts().known(0) == {"number": 0} and parts().known(1) is None
    write(1)
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "a-third"))
    parts().join(2)
    assert names(tmp_path / "out") == ["x.parquet/part-00000.parquet", "x.parquet/part-00001.parquet"]
    table = ParquetTable.open(parts().path)
    assert [batch.column("a")[0].as_py() for _, batch in table.batches(["a"], 1)] == [0, 1]


@pytest.mark.parametrize("when", ["claimed", "finished"])
def test_two_machines_that_write_to_one_url_are_not_both_content(tmp_path, there, monkeypatch, when):
    """Neither saw the other's claim when it looked."""
    folder = local(url(tmp_path / "run"), is_output=True)
    claim = write_json

    def other_writes(*_: object, **__: object) -> None:
        claim(tmp_path / "run" / "run.json", {"cores": 2}, sealed=True)

    def claimed(path: Path, *rest: object, **options: object) -> None:
        claim(path, *rest, **options)
        other_writes()

    if when == "claimed":
        monkeypatch.setattr(runs, "write_json", claimed)
    with (
        process_group(),
        pytest.raises(RunMismatchError, match=f"file://{tmp_path}/run: another job has claimed or removed it"),
        runs.open_run(folder, Cores()) as run,
    ):
        assert when == "finished"
        write_json(folder / "half.json", {})
        other_writes()
        run.finish({})
    assert read_json(tmp_path / "run" / "run.json")["cores"] == 2
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_what_a_machine_makes_of_an_input_it_makes_once(there):
    path = made_beside(local(url(there)), "c.json") / "arrays" / "x.npy"
    calls = []

    def make(path: Path) -> None:
        calls.append(path)
        with atomic_path(path) as file:
            file.write_bytes(b"array")

    assert made_once(path, make) == made_once(path, make) == path
    assert calls == [path] and path.read_bytes() == b"array"
    assert not (there / "arrays").exists()


def test_stores_of_fsspec(there):
    import fsspec

    with fsspec.open("memory://bucket/a.bin", "wb") as file:
        file.write(b"content")
    assert local("memory://bucket/a.bin").read_bytes() == b"content"
    with atomic_path(local("memory://bucket/out/b.bin", is_output=True)) as path:
        path.write_bytes(b"other")
    assert fsspec.open("memory://bucket/out/b.bin").open().read() == b"other"
