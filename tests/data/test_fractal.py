"""The fractal expansion: what of the log each block keeps, who its children are, and that content still tells them."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec import cli
from sidrec_torchrec.data.format import DataSchema, open_items, validate
from sidrec_torchrec.data.fractal import FractalConfig, write_fractal
from sidrec_torchrec.data.fractal_matrix import _truncated_svd, likeness_order, reduce_log, shuffled_among_likes
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.errors import DataError

TIMES = {"users_times": 4, "items_times": 3}
EXACT = {"user_likes": 1, "item_likes": 1, "days": 0}


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    """A log with users, two labels and a feature of events, which its schema names."""
    folder = tmp_path_factory.mktemp("log")
    write_synthetic(SyntheticConfig(items=200, users=60, median_events=60, context=True, second_label=True), folder)
    (folder / "schema.json").write_text(json.dumps({"event_features": ["device"]}))
    return folder


def expand(log: Path, out: Path, **options) -> dict[str, list]:
    """Columns of the expansion's events."""
    write_fractal(FractalConfig(data=log, out=out, **(TIMES | options)))
    return pq.read_table(out / "events.parquet").to_pydict()


def rows(events: dict[str, list], *names: str) -> list[tuple]:
    return list(zip(*(events[name] for name in names), strict=True))


def test_a_block_holds_events_of_its_parents(log: Path, tmp_path: Path) -> None:
    """Nothing shuffled or moved: each child event is an event of its parents, with all that the log says of it."""
    names = ("user_id", "item_id", "timestamp", "label", "like", "device")
    parent = Counter(rows(pq.read_table(log / "events.parquet").to_pydict(), *names))
    events = expand(log, tmp_path / "out", **EXACT)
    blocks: dict[tuple[int, int], Counter] = {}
    for user, item, *rest in rows(events, *names):
        blocks.setdefault((user % 4, item % 3), Counter())[(user // 4, item // 3, *rest)] += 1
    assert len(blocks) == 12
    sizes = []
    for block in blocks.values():
        assert block <= parent
        sizes.append(block.total() / parent.total())
    assert abs(np.mean(sizes) - 0.4) < 0.02 and max(sizes) > 2 * min(sizes)


def test_children_stay_among_likes_and_blocks_keep_their_order(log: Path, tmp_path: Path) -> None:
    parent = pq.read_table(log / "events.parquet").to_pydict()
    time_of_day = {t % 86_400 for t in parent["timestamp"]}
    events = expand(log, tmp_path / "out", days=30)
    pairs = rows(events, "user_id", "item_id", "timestamp")
    parent_pairs = set(rows(parent, "user_id", "item_id"))
    moved = sum((user // 4, item // 3) not in parent_pairs for user, item, _ in pairs)
    assert moved > 0.5 * len(pairs)
    assert {t % 86_400 for t in events["timestamp"]} <= time_of_day
    assert max(events["timestamp"]) <= max(parent["timestamp"]) + 30 * 86_400
    users = np.array(events["user_id"])
    assert (np.diff(users) != 0).sum() + 1 == len(np.unique(users))  # each stands together
    summary = validate(tmp_path / "out", tasks=("label", "like"))  # users' times never go back, ids are known
    assert summary["users"] <= 240 and summary["items"] == 600 and summary["users_without_row"] == 0
    rate = np.mean(parent["label"])
    assert abs(np.mean(events["label"]) - rate) < 0.05
    assert json.loads((tmp_path / "out" / "schema.json").read_text()) == {"event_features": ["device"]}


def test_a_sitting_never_comes_before_one_it_follows(tmp_path: Path) -> None:
    """One user and as many items as events: within each block the item's number rises, whatever the days."""
    item_N = np.arange(300)
    tables = {
        "items": {"item_id": item_N},
        "events": {"user_id": np.zeros(300, np.int64), "item_id": item_N, "timestamp": 10**9 + item_N},
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    events = expand(tmp_path, tmp_path / "out", users_times=1, item_likes=1, days=50)
    item_N, time_N = np.array(events["item_id"]), np.array(events["timestamp"])
    assert (np.diff(time_N) >= 0).all() and len(np.unique((time_N - 10**9) // 86_400)) > 20
    for block in range(3):
        assert (np.diff(item_N[item_N % 3 == block]) > 0).all()
    assert (np.diff(item_N % 3) != 0).sum() > 20  # blocks mix


def test_the_same_seed_gives_the_same_expansion(log: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        expand(log, tmp_path / name, seed=seed)
    for file in ("items.parquet", "events.parquet", "users.parquet"):
        a, b, c = (pq.read_table(tmp_path / name / file) for name in "abc")
        assert a.equals(b)
        assert a.equals(c) == (file == "users.parquet")


@pytest.mark.parametrize("kept", [0.05, 0.8])
def test_as_many_events_as_are_asked_for(log: Path, tmp_path: Path, kept: float) -> None:
    expected = kept * 12 * pq.read_metadata(log / "events.parquet").num_rows
    assert abs(len(expand(log, tmp_path / "out", kept=kept)["label"]) - expected) < 4 * expected**0.5


def test_content_is_the_parents_in_part(log: Path, tmp_path: Path) -> None:
    expand(log, tmp_path / "out", own_content=0.25)
    for source in ("text_emb", "image_emb"):
        parents, children = (
            np.concatenate([b.sources[source] for b in open_items(f).batches()]) for f in (log, tmp_path / "out")
        )
        is_there = np.any(parents, axis=1)
        children = children.reshape(3, *parents.shape)
        assert (np.any(children, axis=2) == is_there).all()
        parents, children = parents[is_there], children[:, is_there]
        for child in children:
            np.testing.assert_allclose(*(np.linalg.norm(x, axis=1) for x in (child, parents)), rtol=2e-3)
        parents = parents - parents.mean(axis=0)
        for child in children:
            own = child - child.mean(axis=0)
            likeness = (own * parents).sum() / np.linalg.norm(own) / np.linalg.norm(parents)
            assert 0.8 < likeness < 0.97  # sqrt(1 - 0.25) is 0.87, and what a block shares is in its mean
            assert 0.7 < own.var(axis=0).sum() / parents.var(axis=0).sum() < 1.1
        assert np.abs(children[0] - children[1]).mean() > 0.3 * np.abs(children[0]).mean()
    items = pq.read_table(tmp_path / "out" / "items.parquet")
    assert items["category"].to_pylist() == 3 * pq.read_table(log / "items.parquet")["category"].to_pylist()
    assert items.schema.field("text_emb").type.value_type == pa.float16()


@pytest.mark.parametrize("kind", ["text", "bytes", "large numbers"])
def test_ids_of_any_type(log: Path, tmp_path: Path, kind: str) -> None:
    make = {"text": lambda i: f"é{i}", "bytes": lambda i: f"b{i}".encode(), "large numbers": lambda i: (1 << 62) + i}[
        kind
    ]
    columns = {"items": ["sku"], "events": ["who", "sku"], "users": ["who"]}
    names = {"item_id": "sku", "user_id": "who"}
    for name, ids in columns.items():
        table = pq.read_table(log / f"{name}.parquet")
        table = table.rename_columns([names.get(column, column) for column in table.column_names])
        for column in ids:
            place = table.column_names.index(column)
            table = table.set_column(place, column, pa.array(map(make, table[column].to_pylist())))
        pq.write_table(table, tmp_path / f"{name}.parquet")
    schema = DataSchema(columns=("item_id=sku", "user_id=who"))
    summary = write_fractal(FractalConfig(data=tmp_path, schema=schema, out=tmp_path / "out", **TIMES))
    assert validate(tmp_path / "out")["events"] == summary["events"]
    users = pq.read_table(tmp_path / "out" / "users.parquet")["user_id"].to_pylist()
    assert len(set(users)) == 240
    mark = {"text": "#", "bytes": b"#"}.get(kind)
    if mark:
        assert {user.rpartition(mark)[0] for user in users} == {make(number) for number in range(1, 61)}


def test_a_log_it_cannot_expand(log: Path, tmp_path: Path) -> None:
    def error(**options) -> str:
        with pytest.raises(DataError) as caught:
            expand(log, tmp_path / "out", **options)
        return str(caught.value)

    assert error(users_times=61) == f"{log}: users_times is 61, but the log has 60 users; expand it fewer times"
    assert "items_times is 201" in error(items_times=201)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="is the folder to expand"):
        write_fractal(FractalConfig(data=log, out=log))
    with pytest.raises(ValueError, match="kept must lie in"):
        FractalConfig(data=log, out=tmp_path, kept=1.0)
    with pytest.raises(ValueError, match="own_content must lie in"):
        FractalConfig(data=log, out=tmp_path, own_content=1.0)


def test_the_command_and_a_prepare_of_what_it_made(log: Path, tmp_path: Path, capsys) -> None:
    flags = ["--data", str(log), "--out", str(tmp_path / "out"), "--users-times", "2", "--items-times", "2"]
    assert cli.main(["data", "fractal", *flags]) == 0
    assert "events per item, expansion: p10" in capsys.readouterr().out
    assert cli.main(["prepare", "--data", str(tmp_path / "out"), "--out", str(tmp_path / "prepared")]) == 0


def test_the_reduced_matrix_is_the_log_in_small() -> None:
    """A log of four tastes, in no order: users of each meet a quarter of the items often."""
    rng = np.random.default_rng(0)
    often = np.full((4, 4), 0.05) + 0.7 * np.eye(4)
    taste_U, kind_I = rng.permutation(80) % 4, rng.permutation(60) % 4
    log_UI = rng.random((80, 60)) < often[taste_U][:, kind_I]
    user_N, item_N = np.nonzero(log_UI)
    reduced = reduce_log(user_N, item_N, np.ones(len(user_N)), (80, 60), (4, 4), 0.3, 0)
    for order, kind_N in ((reduced.user_order_U, taste_U), (reduced.item_order_I, kind_I)):
        kinds = kind_N[order].reshape(-1, 5)  # groups of neighbours, who are to be alike without being told
        assert (kinds == np.median(kinds, axis=1, keepdims=True)).mean() > 0.9
    assert 0.01 <= reduced.keep_AB.min() and reduced.keep_AB.max() <= 0.95
    assert reduced.keep_AB.mean() == pytest.approx(0.3)
    assert len(np.unique(reduced.keep_AB.argmax(axis=1))) >= 3  # users of another taste meet another block most


def test_singular_vectors_are_those_of_a_dense_svd() -> None:
    rng = np.random.default_rng(0)
    user_N, item_N = rng.integers(0, 50, 600), rng.integers(0, 40, 600)
    value_N = rng.choice([-1.0, 1.0], 600)
    dense_UI = np.zeros((50, 40))
    np.add.at(dense_UI, (user_N, item_N), value_N)
    left, values_K, right = np.linalg.svd(dense_UI.clip(-1, 1))
    u_UK, s_K, v_IK = _truncated_svd(user_N, item_N, value_N, (50, 40), 2, 0)
    np.testing.assert_allclose(s_K, values_K[:2], rtol=1e-2)
    expected = (left[:, :2] * values_K[:2]) @ right[:2]
    assert np.linalg.norm((u_UK * s_K) @ v_IK.T - expected) < 0.3 * np.linalg.norm(expected)


def test_neighbours_are_alike_and_shuffles_stay_among_them() -> None:
    x_NK = np.random.default_rng(0).normal(size=(103, 2))
    order = likeness_order(x_NK, 8)
    assert sorted(order) == list(range(103))
    groups = [x_NK[order[i : i + 8]] for i in range(0, 96, 8)]
    assert np.mean([group.var(axis=0).sum() for group in groups]) < 0.25 * x_NK.var(axis=0).sum()
    shuffled = shuffled_among_likes(order, 8, np.random.default_rng(1))
    assert (shuffled != order).any()
    for first in range(0, 103, 8):
        assert set(shuffled[first : first + 8]) == set(order[first : first + 8])
