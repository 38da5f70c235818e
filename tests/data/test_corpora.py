"""Converters of large corpora on small stand-ins of invented rows, in the columns that their authors document."""

import csv
import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec import cli
from sidrec_torchrec.data import kuairand
from sidrec_torchrec.data.format import open_items, validate
from sidrec_torchrec.data.kuairand import KuaiRandConfig, convert_kuairand
from sidrec_torchrec.data.mind import MindConfig, convert_mind
from sidrec_torchrec.data.taobao_mm import TaobaoMMConfig, convert_taobao_mm
from sidrec_torchrec.data.yambda import YambdaConfig, convert_yambda
from sidrec_torchrec.errors import DataError


def error(action) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


def events(folder: Path, *names: str) -> list[tuple]:
    table = pq.read_table(folder / "events.parquet", columns=list(names))
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


def prepare(data: Path, *flags: str) -> None:
    assert cli.main(["prepare", "--data", str(data), "--out", str(data.parent / "prepared"), *flags]) == 0


def write(path: Path, **columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def replaced(path: Path, name: str, values: pa.Array) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(name), name, values), path)


# ---------------------------------------------------------------- Yambda


def yambda(folder: Path, num_users: int = 30) -> Path:
    """Listens sorted by user and time, ratings, and vectors of all tracks but the last one, in another order."""
    rng = np.random.default_rng(0)
    uid_N = np.repeat(np.arange(num_users, dtype=np.uint32) * 10, 20)
    time_N = np.sort(rng.integers(0, 5_000_000, (num_users, 20)), axis=1).ravel() // 5 * 5
    item_N = rng.integers(1, 41, len(uid_N))
    item_N[:2] = 40
    listens = {"uid": uid_N, "timestamp": time_N.astype(np.uint32), "item_id": item_N.astype(np.uint32)}
    listens |= {"is_organic": rng.integers(0, 2, len(uid_N), np.uint8)}
    ratio_N = rng.choice([0, 49, 50, 100, 130], len(uid_N)).astype(np.uint16)
    length_N = (60 + item_N).astype(np.uint32)
    write(folder / "listens.parquet", **listens, played_ratio_pct=ratio_N, track_length_seconds=length_N)
    for name, place in (("likes", 3), ("dislikes", 7)):
        write(folder / f"{name}.parquet", **{column: values[place::20] for column, values in listens.items()})
    order = rng.permutation(50)  # tracks that nobody met, too
    x_ND = rng.normal(size=(50, 6))
    tracks = [int(track) for track in order if track != 40]
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    vectors = {"embed": [x_ND[t].tolist() for t in tracks], "normalized_embed": [unit_ND[t].tolist() for t in tracks]}
    write(folder / "embeddings.parquet", item_id=pa.array(tracks, pa.uint32()), **vectors)
    return folder


def test_yambda(tmp_path: Path) -> None:
    source, out = yambda(tmp_path / "flat"), tmp_path / "out"
    counts = convert_yambda(YambdaConfig(input=source, out=out, embeddings=source / "embeddings.parquet"))
    met = set(pq.read_table(source / "listens.parquet")["item_id"].to_pylist())
    assert counts == {"items": len(met), "items_without_vector": 1, "events": 660}
    listens = pq.read_table(source / "listens.parquet").to_pydict()
    expected = [
        (*row, int(row[3] >= 50), int(row[3] >= 50), None, "listen")
        for row in zip(*(listens[n] for n in ("uid", "item_id", "timestamp", "played_ratio_pct")), strict=True)
    ]
    names = ("user_id", "item_id", "timestamp", "played_ratio_pct", "label", "listen", "like", "kind")
    found = events(out, *names)
    assert sorted(row for row in found if row[-1] == "listen") == sorted(expected)
    ratings = [row for row in found if row[-1] == "rating"]
    assert sorted({row[3:7] for row in ratings}, key=str) == [(None, 0, None, 0), (None, 1, None, 1)]
    assert sum(row[6] for row in ratings) == 30 and len(ratings) == 60
    vectors = pq.read_table(source / "embeddings.parquet").to_pydict()
    unit = dict(zip(vectors["item_id"], vectors["normalized_embed"], strict=True))
    items = pq.read_table(out / "items.parquet").to_pydict()
    assert sorted(items["item_id"]) == sorted(met)
    for item, vector in zip(items["item_id"], items["audio_emb"], strict=True):
        assert vector is None if item == 40 else np.allclose(vector, unit[item], atol=1e-3)
    summary = validate(out, tasks=("listen", "like"))
    assert summary["labels"]["like"] == {"rate": 0.5, "missing": 600}
    prepare(out)
    raw = tmp_path / "raw"
    convert_yambda(YambdaConfig(input=source, out=raw, embeddings=source / "embeddings.parquet", vector="embed"))
    lengths = [np.linalg.norm(v) for v in pq.read_table(raw / "items.parquet")["audio_emb"].to_pylist() if v]
    assert max(lengths) > 1.5


def test_a_share_of_the_users_is_the_same_users_whole(tmp_path: Path) -> None:
    source = yambda(tmp_path / "flat", 400)
    convert_yambda(YambdaConfig(input=source, out=tmp_path / "out", user_share=0.25))
    sizes: dict[int, int] = {}
    for (user,) in events(tmp_path / "out", "user_id"):
        sizes[user] = sizes.get(user, 0) + 1
    assert 70 <= len(sizes) <= 130 and set(sizes.values()) == {22}
    assert open_items(tmp_path / "out").source_dims == {}
    with pytest.raises(ValueError, match="user_share must be above 0"):
        YambdaConfig(input=source, out=tmp_path, user_share=0.0)


def test_broken_yambda(tmp_path: Path) -> None:
    source = yambda(tmp_path / "flat")
    vectors = source / "embeddings.parquet"

    def attempt() -> str:
        return error(lambda: convert_yambda(YambdaConfig(input=source, out=tmp_path / "out", embeddings=vectors)))

    listens = pq.read_table(source / "listens.parquet")
    pq.write_table(listens.drop_columns("played_ratio_pct"), source / "listens.parquet")
    assert f"{source / 'listens.parquet'}: no column 'played_ratio_pct'" in attempt()
    pq.write_table(listens, source / "listens.parquet")
    replaced(source / "listens.parquet", "timestamp", pa.array(["noon"] * len(listens)))
    assert f"{source / 'listens.parquet'}: column 'timestamp' is string; expected numbers" in attempt()
    pq.write_table(listens, source / "listens.parquet")
    replaced(source / "listens.parquet", "item_id", pa.array([None, *listens["item_id"].to_pylist()[1:]], pa.uint32()))
    assert f"{source / 'listens.parquet'}: column 'item_id', row 0: null" in attempt()
    pq.write_table(listens, source / "listens.parquet")
    replaced(vectors, "item_id", pa.array([1] * 49, pa.uint32()))
    assert f"{vectors}: column 'item_id', row 1: item 1 has a row already" in attempt()
    replaced(vectors, "item_id", pa.array(range(1000, 1049), pa.uint32()))
    assert "names none of the log's items" in attempt()
    (source / "listens.parquet").unlink()
    assert str(source / "listens.parquet") in attempt()


# ---------------------------------------------------------------- KuaiRand

LOG_COLUMNS = [
    *("user_id", "video_id", "date", "hourmin", "time_ms", "is_click", "is_like", "is_follow", "is_comment"),
    *("is_forward", "is_hate", "long_view", "play_time_ms", "duration_ms", "profile_stay_time", "comment_stay_time"),
    *("is_profile_enter", "is_rand", "tab"),
]
USER_COLUMNS = [
    *("user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author", "follow_user_num"),
    *("follow_user_num_range", "fans_user_num", "fans_user_num_range", "friend_user_num", "friend_user_num_range"),
    *("register_days", "register_days_range", *(f"onehot_feat{i}" for i in range(18))),
]
VIDEO_COLUMNS = [
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"),
    *("server_width", "server_height", "music_id", "music_type", "tag"),
]


def write_csv(path: Path, columns: list[str], rows: list[list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def log_row(rng: np.random.Generator, user: int, video: int, time_ms: int, is_rand: int) -> list:
    click = int(rng.random() < 0.4)
    signals = [click, *(int(rng.random() < 0.3) * click for _ in range(5)), int(rng.random() < 0.5)]
    row = [user, video, 20220408, 100 * (time_ms // 3_600_000 % 24) + 7, time_ms, *signals]
    return [*row, int(rng.integers(0, 90_000)), 15_000 + video, 0, 0, 0, is_rand, int(rng.integers(0, 15))]


def kuairand_files(folder: Path) -> Path:
    """Logs in order of time over all users, as published; video 39 has no features, video 99 no view."""
    rng = np.random.default_rng(0)
    for number, (name, is_rand) in enumerate(
        [("standard_4_08_to_4_21", 0), ("standard_4_22_to_5_08", 0), ("random_4_22_to_5_08", 1)]
    ):
        times = 1_649_400_000_000 + 1_200_000_000 * min(number, 1) + np.sort(rng.integers(0, 10**9, 300))
        rows = [log_row(rng, int(rng.integers(0, 25)), int(rng.integers(0, 40)), int(t), is_rand) for t in times]
        write_csv(folder / f"log_{name}_pure.csv", LOG_COLUMNS, rows)
    ranges = ["(0,10]", 312, "[100,1k)", 0, "0", 3624, "730+"]
    users = [[u, "full_active", 0, 0, 1, 5, *ranges, u % 2, *(["2.0"] * 17)] for u in range(25)]
    users[3][-1] = ""
    write_csv(folder / "user_features_pure.csv", USER_COLUMNS, users)
    shape = [1, "17200.0", 720, 1280, 989206467, "4.0"]
    videos = [[v, v // 3, "NORMAL", "2020-07-08", f"Import{v % 4}", *shape, "12,65"] for v in [*range(39), 99]]
    videos[5][3], videos[5][11] = "", ""
    write_csv(folder / "video_features_basic_pure.csv", VIDEO_COLUMNS, videos)
    return folder


def test_kuairand(tmp_path: Path) -> None:
    source, out = kuairand_files(tmp_path / "data"), tmp_path / "out"
    vectors = tmp_path / "vectors.parquet"
    write(vectors, item_id=np.arange(40)[::-1], frames=[[float(v), 1.0] for v in range(40)[::-1]])
    counts = convert_kuairand(KuaiRandConfig(input=source, out=out, embeddings=vectors, label="long_view"))
    logs = [
        row
        for path in sorted(source.glob("log_*"))
        for row in csv.DictReader(path.open())
        if row["user_id"] != "user_id"
    ]
    assert (counts["items"], counts["items_without_features"], counts["users"], counts["events"]) == (40, 1, 25, 900)
    assert counts["label_rate"] == pytest.approx(np.mean([int(row["long_view"]) for row in logs]))
    theirs = ("user_id", "video_id", "time_ms", *kuairand.LABELS, "long_view", "tab", "is_rand", "play_time_ms")
    expected = sorted((*(int(row[name]) for name in theirs), int(row["hourmin"]) // 100) for row in logs)
    ours = ("user_id", "item_id", "timestamp", *kuairand.LABELS, "label", "tab", "is_rand", "play_time_ms", "hour")
    assert sorted(events(out, *ours)) == expected
    items = pq.read_table(out / "items.parquet").to_pylist()
    assert items[0] | {"upload_dt": None} == {
        "item_id": 0,
        "author_id": 0,
        "video_type": "NORMAL",
        "upload_type": "Import0",
        "music_type": "4.0",
        "upload_dt": None,
        "video_duration": 17200.0,
        "tags": ["12", "65"],
    }
    assert items[0]["upload_dt"].isoformat() == "2020-07-08"
    assert items[5]["upload_dt"] is None and items[5]["tags"] is None
    assert items[39]["item_id"] == 39 and set(items[39].values()) == {39, None}
    users = pq.read_table(out / "users.parquet").to_pydict()
    assert users["onehot_feat0"] == [u % 2 for u in users["user_id"]]
    assert users["onehot_feat17"][3] is None and users["register_days_range"][0] == "730+"
    summary = validate(out, tasks=("is_click", "is_like", "long_view"))
    assert summary["sources"] == {"frames": {"dim": 2, "missing": 0}} and summary["users_without_row"] == 0
    prepare(out, "--tasks", "is_click,is_like,long_view")
    (tmp_path / "logged").mkdir()
    convert_kuairand(KuaiRandConfig(input=source, out=tmp_path / "logged" / "out", randomly_shown=False))
    assert {is_rand for (is_rand,) in events(tmp_path / "logged" / "out", "is_rand")} == {0}
    prepare(tmp_path / "logged" / "out")


def test_broken_kuairand(tmp_path: Path) -> None:
    source = kuairand_files(tmp_path / "data")
    log, videos = source / "log_standard_4_08_to_4_21_pure.csv", source / "video_features_basic_pure.csv"

    def attempt(path: Path | None = None, before: str = "", after: str = "") -> str:
        kuairand_files(source)
        if path is not None:
            text = path.read_text()
            assert before in text
            path.write_text(text.replace(before, after, 1))
        return error(lambda: convert_kuairand(KuaiRandConfig(input=source, out=tmp_path / "out")))

    assert f"{log}: no column 'is_hate'; the file has user_id" in attempt(log, "is_hate", "hated")
    text = log.read_text().splitlines()
    row = next(row for row in csv.reader(text[1:]))
    broken = ",".join([*row[:5], "yes", *row[6:]])
    message = attempt(log, ",".join(row), broken)
    assert message.startswith(f"{log}: column 'is_click': ") and "'yes'" in message and "Row #2" in message
    message = attempt(log, ",".join(row), ",".join([*row[:5], "3", *row[6:]]))
    assert message == f"{log}: line 2: column 'is_click' is 3; a signal is 0 or 1"
    message = attempt(log, ",".join(row), ",".join([*row[:4], "", *row[5:]]))
    assert message == f"{log}: line 2: column 'time_ms' is empty; every line needs a value"
    assert "Expected 19 columns, got 2" in attempt(log, ",".join(row), "1,2")
    assert f"{videos}: line 2 and after: a video_id has two rows" in attempt(videos, "\n1,0,", "\n0,0,")
    videos.unlink()
    message = error(lambda: convert_kuairand(KuaiRandConfig(input=source, out=tmp_path / "out")))
    assert f"{source}: no file video_features_basic_*.csv" in message
    with pytest.raises(ValueError, match="label must be one of is_click"):
        KuaiRandConfig(input=source, out=tmp_path, label="clicked")
    kuairand_files(source)
    write(tmp_path / "ids.parquet", item_id=[1])
    config = KuaiRandConfig(input=source, out=tmp_path / "out", embeddings=tmp_path / "ids.parquet")
    assert "no column of float lists" in error(lambda: convert_kuairand(config))


# ---------------------------------------------------------------- MIND


def entities(*names: str) -> str:
    return json.dumps([{"Label": n, "Type": "P", "WikidataId": n, "Confidence": 1.0} for n in names])


def mind_folder(folder: Path, first: int, users: range, day: int) -> Path:
    rng = np.random.default_rng(first)
    folder.mkdir(parents=True)
    news = [
        f'N{n}\tsports\tgolf{n % 3}\tTitle {n} "quoted\tAn abstract {n}.\thttps://example.org/{n}\t{entities("Q1", "Q2")}\t{entities("Q1")}'
        for n in range(first, first + 30)
    ]
    news[3] = f"N{first + 3}\tnews\tus\tOnly a title\t\thttps://example.org\t[]\t[]"
    (folder / "news.tsv").write_text("\n".join(news) + "\n")
    lines = []
    for number in range(60):
        user = users[number % len(users)]
        shown = [f"N{n}-{int(rng.random() < 0.3)}" for n in rng.choice(np.arange(first, first + 30), 4, replace=False)]
        clicked = "" if user == 2 else f"N{first + user % 5} N{first + 9} N{first + 4}"
        hour, half = number % 12 + 1, "AM" if number % 24 < 12 else "PM"
        time = f"11/{day}/2019 {hour}:22:32 {half}"
        lines.append(f"{number + 1}\tU{user}\t{time}\t{clicked}\t{' '.join(shown)}")
    (folder / "behaviors.tsv").write_text("\n".join(lines) + "\n")
    # the published files end lines with a tab
    (folder / "entity_embedding.vec").write_text("Q1\t1.0\t0.0\t\nQ2\t0.0\t0.5\t\n")
    return folder


def test_mind(tmp_path: Path, capsys) -> None:
    folders = (mind_folder(tmp_path / "train", 0, range(8), 9), mind_folder(tmp_path / "dev", 20, range(6, 12), 15))
    out = tmp_path / "out"
    counts = convert_mind(MindConfig(input=folders, out=out, text_dim=4))
    assert (counts["items"], counts["users"], counts["history_events"], counts["events"]) == (50, 12, 33, 33 + 480)
    names = ("user_id", "item_id", "timestamp", "label", "weight", "kind", "impression_id", "hour")
    found = [row for row in events(out, *names) if row[0] == "U1"]
    start = int(datetime(2019, 11, 9, 0, 22, 32, tzinfo=timezone.utc).timestamp())  # the first of all impressions
    clicks = [("U1", news, start - 3 + i, 1, 0, "history") for i, news in enumerate(("N1", "N9", "N4"))]
    assert [row[:6] for row in found[:3]] == clicks
    lines = [line.split("\t") for line in (folders[0] / "behaviors.tsv").read_text().splitlines()]
    mine = [(int(line[0]), word) for line in lines if line[1] == "U1" for word in line[4].split()]
    shown = sorted((impression, f"{item}-{label}") for _, item, _, label, _, _, impression, _ in found[3:])
    assert shown == sorted(mine) and all(row[4:6] == (1, "impression") for row in found[3:])
    assert {row[7] for row in found[3:]} == {int(h) % 12 + 12 * (p == "PM") for h, p in hours_of(lines, "U1")}
    items = pq.read_table(out / "items.parquet").to_pydict()
    assert items["item_id"] == [f"N{n}" for n in range(50)]
    assert items["entity_emb"][0] == [0.5, 0.25] and items["entity_emb"][3] is None
    assert items["text"][3] == "Only a title" and items["text"][0] == 'Title 0 "quoted. An abstract 0.'
    assert open_items(out).source_dims == {"entity_emb": 2, "text_emb": 4}
    summary = validate(out)
    assert summary["users"] == 12 and summary["events"] == 513
    prepare(out, "--split", "time", "--test-from", "2019-11-15")
    capsys.readouterr()
    flags = ["--input", ",".join(map(str, folders)), "--out", str(out), "--text-dim", "0", "--history", "false"]
    assert cli.main(["data", "mind", *flags, "--entities", "false"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["history_events"], counts["events"], counts["users"]) == (0, 480, 12)


def hours_of(lines: list[list[str]], user: str) -> list[tuple[str, str]]:
    return [(line[2].split()[1].split(":")[0], line[2].split()[2]) for line in lines if line[1] == user]


def test_broken_mind(tmp_path: Path) -> None:
    folder = mind_folder(tmp_path / "train", 0, range(8), 9)
    originals = {path: path.read_text() for path in folder.iterdir()}

    def attempt(name: str, number: int, before: str, after: str) -> str:
        path = folder / name
        lines = originals[path].splitlines()
        assert before in lines[number - 1]
        lines[number - 1] = lines[number - 1].replace(before, after)
        path.write_text("\n".join(lines) + "\n")
        message = error(lambda: convert_mind(MindConfig(input=(folder,), out=tmp_path / "out", text_dim=0)))
        path.write_text(originals[path])
        assert message.startswith(str(path)), message
        return message

    assert "line 2: column 'time' is '15.11.2019'" in attempt("behaviors.tsv", 2, "11/9/2019 2:22:32 AM", "15.11.2019")
    message = attempt("behaviors.tsv", 4, "N14-0", "N14")
    assert "line 4: column 'impressions' has 'N14'" in message and "test folder does not have" in message
    assert "line 2: news 'N999' is in no news.tsv" in attempt("behaviors.tsv", 2, "N9 ", "N999 ")
    assert "line 3: column 'user' is empty" in attempt("behaviors.tsv", 3, "U2", "")
    assert "Expected 5 columns, got 4" in attempt("behaviors.tsv", 2, "\tU1\t", "\t")
    assert "line 1: column 'title_entities' is no JSON list" in attempt(
        "news.tsv", 1, '"WikidataId": "Q2"', '"Id": "Q2"'
    )
    assert "line 2: 1 numbers, expected 2" in attempt("entity_embedding.vec", 2, "\t0.5", "")
    (folder / "entity_embedding.vec").unlink()
    assert "--entities false" in error(lambda: convert_mind(MindConfig(input=(folder,), out=tmp_path / "out")))


# ---------------------------------------------------------------- TAOBAO-MM

BIG = -58_759_430_334_327_705  # ids are any 64 bits


def taobao(folder: Path) -> Path:
    """20 users of train, 12 of test, two of them in both; 3 to 30 behaviours, one of them 0; item 49 has no vector."""
    rng = np.random.default_rng(0)
    item = np.array([BIG + i for i in range(50)])
    for split, users in (("train", range(1, 21)), ("test", range(19, 31))):
        lengths = [int(rng.integers(3, 31)) for _ in users]
        history = [item[rng.integers(0, 50, n)].tolist() for n in lengths]
        history[0][1] = 0
        columns = {"129_1": list(users), **{f"130_{i}": [u % i for u in users] for i in range(1, 6)}}
        category = [[0 if i == 0 else 7 + (i - BIG) % 4 for i in items] for items in history]
        write(folder / f"{split}_user_features.parquet", **columns, **{"150_2_180": history, "151_2_180": category})
        user_N = np.repeat(np.array(users), 11)
        label_N = rng.integers(0, 2, len(user_N))
        labels = pa.array([[1 - int(v), int(v)] for v in label_N], pa.list_(pa.int8()))
        samples = {"label_0": labels, "129_1": user_N, "205": item[rng.integers(0, 20, len(user_N))]}
        write(folder / f"{split}_samples.parquet", **samples)
    write(
        folder / "item_features.parquet",
        **{"205": item[:20], "206": 7 + np.arange(20) % 4, "213": np.arange(20), "214": [0] * 20},
    )
    vectors = pa.array(rng.integers(-127, 128, (49, 128)).tolist(), pa.list_(pa.int8()))
    write(folder / "scl_embedding_int8_p90.parquet", **{"205": item[:49][::-1], "205_c": vectors})
    return folder


def test_taobao_mm(tmp_path: Path) -> None:
    source, out = taobao(tmp_path / "raw"), tmp_path / "out"
    counts = convert_taobao_mm(TaobaoMMConfig(input=source, out=out))
    train, test = (pq.read_table(source / f"{split}_user_features.parquet").to_pydict() for split in ("train", "test"))
    history = dict(zip(test["129_1"], test["150_2_180"], strict=True)) | dict(
        zip(train["129_1"], train["150_2_180"], strict=True)
    )
    num_behaviours = sum(item != 0 for items in history.values() for item in items)
    assert (counts["users"], counts["samples"], counts["events"]) == (30, 32 * 11, num_behaviours + 32 * 11)
    assert (counts["items"], counts["items_without_vector"]) == (50, 1)
    found = events(out, "user_id", "item_id", "timestamp", "label", "weight", "kind")
    for user in (1, 19, 25):
        mine = [row[1:] for row in found if row[0] == user]
        behaviours = [row for row in mine if row[-1] == "behaviour"]
        assert [row[0] for row in behaviours] == [item for item in history[user] if item]
        assert behaviours[-1][1:4] == (10_000, 1, 0) and {row[2:4] for row in behaviours} == {(1, 0)}
        assert behaviours[0][1] == 10_001 - len(history[user])
        expected = [10_001] * 11 * (user < 21) + [10_002] * 11 * (user > 18)
        assert [row[1] for row in mine[len(behaviours) :]] == expected
    samples = pq.read_table(source / "train_samples.parquet").to_pydict()
    given = zip(samples["129_1"], samples["205"], samples["label_0"], strict=True)
    ours = sorted((row[0], row[1], row[3]) for row in found if row[2] == 10_001)
    assert ours == sorted((user, item, label[1]) for user, item, label in given)
    vectors = pq.read_table(source / "scl_embedding_int8_p90.parquet").to_pydict()
    scaled = {i: np.array(v) / 127 for i, v in zip(vectors["205"], vectors["205_c"], strict=True)}
    for row in pq.read_table(out / "items.parquet").to_pylist():
        number = row["item_id"] - BIG
        assert row["category"] == 7 + number % 4 and row["item_214"] is None
        assert row["item_213"] == (number if 0 < number < 20 else None)
        assert (
            row["scl_emb"] is None if number == 49 else np.allclose(row["scl_emb"], scaled[row["item_id"]], atol=1e-3)
        )
    users = pq.read_table(out / "users.parquet").to_pydict()
    assert sorted(users["user_id"]) == list(range(1, 31))
    assert users["user_130_5"] == [u % 5 or None for u in users["user_id"]]
    schema = json.loads((out / "schema.json").read_text())
    assert schema == {"event_features": ["kind"], "item_features": ["item_213"], "event_weight": "weight"}
    assert validate(out)["users_without_row"] == 0
    prepare(out, "--split", "time", "--train-from", "10001", "--test-from", "10002")
    prepared = json.loads((tmp_path / "prepared" / "metrics.json").read_text())
    assert "met" in prepared


def test_broken_taobao_mm(tmp_path: Path) -> None:
    source = tmp_path / "raw"

    def attempt(file: str, column: str, value, kind: pa.DataType) -> str:
        taobao(source)
        path = source / f"{file}.parquet"
        values = pq.read_table(path)[column].to_pylist()
        replaced(path, column, pa.array([values[0], value, *values[2:]], kind))
        message = error(lambda: convert_taobao_mm(TaobaoMMConfig(input=source, out=tmp_path / "out")))
        assert message.startswith(f"{path}: column '{column}'"), message
        return message

    longs = pa.list_(pa.int64())
    assert "row 1: [0, 0]; a label is [0, 1] or [1, 0]" in attempt(
        "train_samples", "label_0", [0, 0], pa.list_(pa.int8())
    )
    assert "row 1: [1]; a label is" in attempt("test_samples", "label_0", [1], pa.list_(pa.int8()))
    assert "row 1: 1 categories of" in attempt("train_user_features", "151_2_180", [5], longs)
    assert "a user has two rows" in attempt("train_user_features", "129_1", 1, pa.int64())
    assert "row 1 (item_id" in attempt("scl_embedding_int8_p90", "205_c", [1, 2], pa.list_(pa.int8()))
    taobao(source)
    replaced(source / "train_user_features.parquet", "150_2_180", pa.array(["1,2"] * 20))
    message = error(lambda: convert_taobao_mm(TaobaoMMConfig(input=source, out=tmp_path / "out")))
    assert "column '150_2_180' is string; expected lists of numbers" in message
    (source / "item_features.parquet").unlink()
    message = error(lambda: convert_taobao_mm(TaobaoMMConfig(input=source, out=tmp_path / "out")))
    assert message.startswith(str(source / "item_features.parquet"))


@pytest.mark.parametrize("name", ["yambda", "kuairand", "mind", "taobao-mm"])
def test_the_commands_are_there(name: str, capsys) -> None:
    assert f"data {name}" in cli.commands()
    assert cli.main(["data", name, "--help"]) == 0
    assert "--user-share" in capsys.readouterr().out
