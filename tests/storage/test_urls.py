"""Names: URLs, their mirrors, and what is said of them."""

from pathlib import Path

import pytest

from sidrec_torchrec.files import write_json
from sidrec_torchrec.storage.urls import (
    IN,
    OUT,
    absolute,
    as_urls,
    is_url,
    made_beside,
    place_of,
    place_of_url,
    relative,
)
from sidrec_torchrec.training.config import located


@pytest.fixture(autouse=True)
def mirrors(tmp_path, monkeypatch):
    monkeypatch.setenv("SIDREC_STORAGE", str(tmp_path / "mirrors"))


@pytest.mark.parametrize(
    ("typed", "url"),
    [
        ("s3://bucket/a/b.parquet", "s3://bucket/a/b.parquet"),
        ("s3://bucket/a//./b/../c/", "s3://bucket/a/c"),
        ("S3://bucket", "s3://bucket/"),
        ("s3a://bucket/a", "s3://bucket/a"),
        ("hdfs://host:8020/a", "hdfs://host:8020/a"),
        ("abfs://container@account.dfs.core.windows.net/a", "abfs://container@account.dfs.core.windows.net/a"),
        ("gs://bucket/a b", "gs://bucket/a b"),
        ("file:///home/me/a", "file:///home/me/a"),
        (
            "s3://bucket/a?endpoint_override=http://127.0.0.1:9000&region=x",
            "s3://bucket/a?endpoint_override=http://127.0.0.1:9000&region=x",
        ),
    ],
)
def test_a_mirror_leads_back_to_its_url(typed, url):
    for path in (typed, Path(typed)):  # which has lost a slash
        assert is_url(path)
        for area in (IN, OUT):
            place = place_of_url(path, area)
            assert place.url == url
            assert place_of(place.path) == place
            assert place_of(place.path / "more" / "x") != place


@pytest.mark.parametrize("path", ["a/b", "/a/b.parquet", "C:/a", "a:b", "../x", "data/s3://x", ""])
def test_other_paths_are_no_urls(path):
    assert not is_url(path)
    assert place_of(Path(path)) is None


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("s3://key:secret@bucket/a", "with credentials"),
        ("s3://bucket/a?secret_key=x", "with credentials"),
        ("s3://bucket/a?endpoint_override=http://me:secret@host", "with credentials"),
        ("gs://user@bucket", "with credentials"),
        ("abfs://container:secret@account.dfs.core.windows.net/a", "with credentials"),
        ("az://container/a?sig=secret", "with credentials"),
        ("s3://", "s3://: names no bucket"),
        ("s3:///", "s3://: names no bucket"),
        ("file:///", "file:///: names no file or folder"),
    ],
)
def test_credentials_and_urls_that_name_nothing_are_refused(url, why):
    for typed in (url, Path(url)):
        assert is_url(typed)
        with pytest.raises(ValueError, match=why) as raised:
            place_of_url(typed, IN)
        assert "secret" not in str(raised.value)


def test_people_see_urls():
    path = place_of_url("s3://bucket/data?region=x", OUT).path
    assert as_urls(f"{path / 'items.parquet'}: column 'a', and {path}") == (
        "s3://bucket/data/items.parquet: column 'a', and s3://bucket/data"
    )
    assert as_urls("/a/b: s3%3A%2F%2Fx") == "/a/b: s3%3A%2F%2Fx"


def test_paths_are_kept_so_that_folders_can_move_together(tmp_path):
    run, data = (place_of_url(f"s3://bucket/{name}", IN).path for name in ("runs/one", "data"))
    elsewhere = place_of_url("s3://other/data", IN).path
    assert relative(data, run) == "../../data" and absolute(data) == "s3://bucket/data"
    assert relative(elsewhere, run) == "s3://other/data"
    assert relative(tmp_path / "data", run) == str(tmp_path / "data")
    assert relative(data, tmp_path) == "s3://bucket/data"
    assert relative(tmp_path / "data", tmp_path / "runs" / "one") == "../../data"


def test_a_kept_url_is_found_again(tmp_path):
    (tmp_path / "there").mkdir()
    write_json(tmp_path / "there" / "a.json", {"a": 1})
    url = f"file://{tmp_path}/there"
    found = located({"path": url, "was": url}, tmp_path / "run")
    assert (found / "a.json").exists() and place_of(found).url == url
    runs = place_of_url(f"file://{tmp_path}/run", IN).path
    assert located({"path": "../there", "was": "/not/any/more"}, runs) == found
    assert located({"path": "../gone", "was": url}, runs) == found


def test_what_is_made_of_a_folder_is_made_anew_of_another_content(tmp_path):
    (tmp_path / "a.json").write_text("1")
    assert made_beside(tmp_path, "a.json") == tmp_path
    mirror = place_of_url(f"file://{tmp_path}/x", IN).path
    mirror.mkdir(parents=True)
    (mirror / "a.json").write_text("1")
    first = made_beside(mirror, "a.json")
    assert first == made_beside(mirror, "a.json") and not first.is_relative_to(mirror)
    (mirror / "a.json").write_text("2")
    assert made_beside(mirror, "a.json") != first
