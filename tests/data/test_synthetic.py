"""The synthetic corpus: reproducible, and with the structure its docstring promises."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data import synthetic, synthetic_events
from sidrec_torchrec.data.format import open_items, validate
from sidrec_torchrec.data.synthetic import SyntheticConfig, write_synthetic
from sidrec_torchrec.data.synthetic_events import EPOCH, SPAN, _sample_alive
from sidrec_torchrec.data.synthetic_items import FIRST_ITEM_ID, World, make_items
from sidrec_torchrec.errors import DataError

SMALL = SyntheticConfig(items=300, users=60, median_events=60, max_events=900)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_synthetic(SyntheticConfig(items=1_000, users=250), folder)
    return folder


def read(folder: Path, name: str) -> pa.Table:
    return pq.read_table(folder / f"{name}.parquet")


def columns(folder: Path, name: str, *names: str) -> list[np.ndarray]:
    table = read(folder, name)
    return [table[column].to_numpy() for column in names]


# ---------------------------------------------------------------- reproducible


def test_same_seed_same_corpus_whatever_the_block(tmp_path: Path, monkeypatch) -> None:
    write_synthetic(SMALL, tmp_path / "one")
    monkeypatch.setattr(synthetic, "_BLOCK_EVENTS", 700)
    write_synthetic(SMALL, tmp_path / "many")
    for name in ("items", "events", "users"):
        assert read(tmp_path / "one", name).equals(read(tmp_path / "many", name))
    assert pq.ParquetFile(tmp_path / "one" / "events.parquet").num_row_groups == 1
    assert pq.ParquetFile(tmp_path / "many" / "events.parquet").num_row_groups > 3


def test_another_seed_another_corpus(tmp_path: Path) -> None:
    write_synthetic(SMALL, tmp_path / "a")
    write_synthetic(SyntheticConfig(**(vars(SMALL) | {"seed": 1})), tmp_path / "b")
    assert not read(tmp_path / "a", "events").equals(read(tmp_path / "b", "events"))


def test_a_context_changes_labels_alone_and_pays_for_who_knows_it(tmp_path: Path) -> None:
    config = SyntheticConfig(**(vars(SMALL) | {"users": 200}))
    write_synthetic(config, tmp_path / "one")
    write_synthetic(SyntheticConfig(**(vars(config) | {"context": True, "context_weight": 3.0})), tmp_path / "two")
    one, two = read(tmp_path / "one", "events"), read(tmp_path / "two", "events")
    assert two.drop_columns(["device", "label"]).equals(one.drop_columns(["label"]))
    assert read(tmp_path / "two", "users").equals(read(tmp_path / "one", "users"))
    assert 0.02 < (one["label"].to_numpy() != two["label"].to_numpy()).mean() < 0.5
    category_I = read(tmp_path / "two", "items")["category"].to_numpy()
    frame = two.to_pandas().assign(category=category_I[two["item_id"].to_numpy() - FIRST_ITEM_ID])
    spread = frame.groupby(["category", "device"])["label"].mean().unstack().std(axis=1).mean()
    chance = frame.assign(device=np.random.default_rng(0).permutation(frame["device"]))
    assert spread > 3 * chance.groupby(["category", "device"])["label"].mean().unstack().std(axis=1).mean()


def test_orders_change_labels_alone(tmp_path: Path) -> None:
    """What they do to labels: see the formula, below."""
    write_synthetic(SMALL, tmp_path / "one")
    write_synthetic(SyntheticConfig(**(vars(SMALL) | {"orders": 0.2})), tmp_path / "two")
    one, two = read(tmp_path / "one", "events"), read(tmp_path / "two", "events")
    assert two.drop_columns(["kind", "label"]).equals(one.drop_columns(["label"]))
    kind_N = two["kind"].to_numpy()
    assert set(kind_N) == {"click", "order"} and 0.18 < (kind_N == "order").mean() < 0.22


def test_a_second_label_is_rarer_and_leaves_the_first_as_it_was(tmp_path: Path) -> None:
    write_synthetic(SMALL, tmp_path / "one")
    write_synthetic(SyntheticConfig(**(vars(SMALL) | {"second_label": True})), tmp_path / "two")
    one, two = read(tmp_path / "one", "events"), read(tmp_path / "two", "events")
    assert two.drop_columns(["like"]).equals(one)
    label_N, like_N = two["label"].to_numpy(), two["like"].to_numpy()
    assert not (like_N > label_N).any() and 0.05 < like_N.mean() < label_N.mean() - 0.2


def test_idle_content_is_content_that_events_do_not_turn_on(tmp_path: Path) -> None:
    write_synthetic(SMALL, tmp_path / "none")
    write_synthetic(SyntheticConfig(**(vars(SMALL) | {"idle_dims": 48})), tmp_path / "idle")
    assert read(tmp_path / "idle", "events").equals(read(tmp_path / "none", "events"))
    none, idle = read(tmp_path / "none", "items"), read(tmp_path / "idle", "items")
    assert idle["category"].equals(none["category"]) and not idle["text_emb"].equals(none["text_emb"])
    about_latent = []
    for count in (0, 48):
        config = SyntheticConfig(missing=0.0, idle_dims=count)
        world = make_items(config)
        text_ID = _vectors(synthetic.items_table(config, world)["text_emb"])
        about_latent.append(explained_variance(world.latent_ID, text_ID).mean())
    assert about_latent[1] < about_latent[0] / 2


def test_more_users_leave_the_first_ones_as_they_were(tmp_path: Path) -> None:
    write_synthetic(SMALL, tmp_path / "few")
    write_synthetic(SyntheticConfig(**(vars(SMALL) | {"users": 90})), tmp_path / "more")
    few, more = read(tmp_path / "few", "events"), read(tmp_path / "more", "events")
    assert more.num_rows > few.num_rows
    assert more.slice(0, few.num_rows).equals(few)


# ---------------------------------------------------------------- what the files hold


def test_the_files_are_valid_and_of_the_size_asked_for(corpus: Path) -> None:
    summary = validate(corpus)
    assert summary["items"] == 1_000
    assert summary["users"] == 250
    assert summary["users_without_row"] == 0
    assert 90 <= summary["history"]["p50"] <= 170
    assert {name: source["dim"] for name, source in summary["sources"].items()} == {"text_emb": 64, "image_emb": 48}
    for source in summary["sources"].values():
        assert 10 <= source["missing"] <= 55  # 3% of 1,000
    assert open_items(corpus).categorical == ("category", "tags")
    recorded = json.loads((corpus / "synthetic.json").read_text())
    assert recorded["events"] == summary["events"]
    assert recorded["label_rate"] == summary["labels"]["label"]["rate"]
    assert SyntheticConfig(**recorded["config"]) == SyntheticConfig(items=1_000, users=250)


def test_histories_reach_ten_thousand_events(tmp_path: Path) -> None:
    write_synthetic(SyntheticConfig(users=4, median_events=9_000), tmp_path)
    assert validate(tmp_path)["history"]["max"] == 10_000


def test_popularity_is_skewed_and_new_items_come_late(corpus: Path) -> None:
    item_N, time_N = columns(corpus, "events", "item_id", "timestamp")
    counts = np.sort(np.bincount(item_N - FIRST_ITEM_ID, minlength=1_000))[::-1]
    assert counts[:100].sum() > 0.3 * counts.sum()
    release_I = make_items(SyntheticConfig(items=1_000, users=250)).release_I
    assert (release_I > 0).mean() == 0.15
    share_N = (time_N - synthetic_events.EPOCH) / synthetic_events.SPAN
    assert (share_N >= release_I[item_N - FIRST_ITEM_ID] - 1e-6).all()
    late_N = share_N > 0.98
    assert 0.05 < (release_I[item_N - FIRST_ITEM_ID] > 0)[late_N].mean() < 0.3


def test_events_come_in_sessions(corpus: Path) -> None:
    user_N, time_N = columns(corpus, "events", "user_id", "timestamp")
    gap_N = np.diff(time_N)[np.diff(user_N) == 0]
    assert 0.8 < (gap_N < 600).mean() < 0.95
    assert np.percentile(gap_N, 98) > 86_400


def test_sources_share_a_part_and_each_has_its_own() -> None:
    """The latent vector is read best from both; what one source does not see, the other must tell."""
    config = SyntheticConfig(missing=0.0)
    world = make_items(config)
    table = synthetic.items_table(config, world)
    text, image = _vectors(table["text_emb"]), _vectors(table["image_emb"])
    explained = {
        name: explained_variance(x, world.latent_ID)
        for name, x in (("text", text), ("image", image), ("both", np.c_[text, image]))
    }
    private_text, shared, private_image = slice(0, 4), slice(4, 12), slice(12, 16)
    for part, only, other in ((private_text, "text", "image"), (private_image, "image", "text")):
        assert explained[only][part].mean() > explained[other][part].mean() + 0.15
    for name in ("text", "image"):
        assert explained[name][shared].mean() > 0.4
        assert explained["both"].mean() > explained[name].mean() + 0.03


def _vectors(column: pa.ChunkedArray) -> np.ndarray:
    return np.stack(column.to_numpy(zero_copy_only=False)).astype(np.float64)


def explained_variance(x_ND: np.ndarray, y_NM: np.ndarray) -> np.ndarray:
    """Held-out share of the variance of each column of y that a linear map of x explains."""
    half = len(x_ND) // 2
    x_ND = np.c_[np.ones(len(x_ND)), x_ND]
    weights = np.linalg.lstsq(x_ND[:half], y_NM[:half], rcond=None)[0]
    rest = y_NM[half:]
    return 1 - ((rest - x_ND[half:] @ weights) ** 2).mean(0) / rest.var(0)


def test_user_columns_tell_a_little(corpus: Path) -> None:
    """Label rates differ between regions by more than between shuffled regions."""
    user_N, label_N = columns(corpus, "events", "user_id", "label")
    region_U = np.array(read(corpus, "users")["region"].to_pylist())
    rate_U = np.bincount(user_N - 1, label_N) / np.bincount(user_N - 1)

    def between(groups: np.ndarray) -> float:
        means = [(rate_U[groups == g].mean(), (groups == g).sum()) for g in np.unique(groups)]
        return sum(n * (m - rate_U.mean()) ** 2 for m, n in means)

    rng = np.random.default_rng(0)
    shuffled = [between(rng.permutation(region_U)) for _ in range(200)]
    assert between(region_U) > np.percentile(shuffled, 95)


# ---------------------------------------------------------------- labels


@pytest.mark.parametrize("orders", [0.0, 0.3])
def test_probabilities_are_those_of_the_formula(orders: float) -> None:
    """Against the docstring's sums, written out event by event."""
    config = SyntheticConfig(items=100, users=3, median_events=90, recent_events=7, categories=5, orders=orders)
    world = make_items(config)
    users_U, lengths_U = np.arange(3), np.array([40, 90, 61])
    block = synthetic_events.make_events(config, world, users_U, lengths_U)
    draws = synthetic_events.draw(config, users_U, lengths_U)
    user_N = np.repeat(users_U, lengths_U)
    starts_U = np.cumsum(lengths_U) - lengths_U
    _, session_N = synthetic_events._times(draws, user_N, starts_U, lengths_U)
    focus_N = synthetic_events._interests(draws, user_N, starts_U, session_N)
    item_N = block.events["item_id"].to_numpy() - FIRST_ITEM_ID
    signs_N = 2.0 * block.events["label"].to_numpy() - 1

    for u, start in enumerate(starts_U):
        for t in range(lengths_U[u]):
            phi = world.membership_IC[item_N[start + t]]

            def match(pool: Sequence[int], prior: float, phi=phi, start=start) -> float:
                like = [phi @ world.membership_IC[item_N[start + j]] for j in pool]
                signs = [signs_N[start + j] for j in pool]
                kernel = (config.prior * prior + np.dot(like, signs)) / (config.prior + np.sum(like))
                return kernel - (np.mean(signs) if len(pool) else 0.0)

            taste = phi @ np.tanh(draws.taste_UC[u])
            ordered = [j for j in range(t) if orders and block.events["kind"][int(start) + j].as_py() == "order"]
            logit = (
                config.bias
                + config.recent_weight * match(range(max(t - 7, 0), t), 2 * phi[focus_N[start + t]] - 1)
                + config.distant_weight * match(range(t // 2), taste)
                + config.orders_weight * (match(ordered, taste) if orders else 0.0)
                + config.quality_weight * world.quality_I[item_N[start + t]]
                + draws.bias_U[u]
            )
            assert block.probability_N[start + t] == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-9)


def features(folder: Path, kind_IC: np.ndarray, *, prior: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """What a reader can count for each event, [N, 3], and the labels: 1; how the user took items of the same kind among
    the last 32 events, and in the older half of his history, against how he took all of those.

    Args:
        kind_IC: (soft) membership of each item in some kinds.
        prior: shrinks what few like items say.
    """
    rows = []
    user = None
    user_N, item_N, label_N = columns(folder, "events", "user_id", "item_id", "label")
    for u, i, y in zip(user_N.tolist(), (item_N - FIRST_ITEM_ID).tolist(), label_N.tolist(), strict=True):
        if u != user:
            user, history = u, []
            recent, distant = np.zeros((2, kind_IC.shape[1])), np.zeros((2, kind_IC.shape[1]))
        kind_C, t = kind_IC[i], len(history)
        rows.append([1.0])
        for pool in (recent, distant):
            signed, count = pool @ kind_C
            signed_all, count_all = pool.sum(1)
            rows[-1].append(signed / (count + prior) - signed_all / max(count_all, 1.0))
        history.append(np.stack([kind_C * (2 * y - 1), kind_C]))
        recent += history[-1]
        if t >= 32:
            recent -= history[t - 32]
        if t % 2:
            distant += history[t // 2]
    return np.array(rows), label_N.astype(np.float64)


def categories(folder: Path) -> np.ndarray:
    """One-hot categories, [I, C], as the item file has them."""
    names = np.array(read(folder, "items")["category"].to_pylist())
    return (names[:, None] == np.unique(names)).astype(np.float64)


def fit(x_NF: np.ndarray, y_N: np.ndarray) -> tuple[np.ndarray, float]:
    """Logistic regression by Newton's method: z-score of each weight, and the normalized entropy."""
    weights = np.zeros(x_NF.shape[1])
    for _ in range(12):
        p_N = 1 / (1 + np.exp(-x_NF @ weights))
        hessian = x_NF.T @ (x_NF * (p_N * (1 - p_N))[:, None])
        weights += np.linalg.solve(hessian, x_NF.T @ (y_N - p_N))
    rate = y_N.mean()
    cross = -(y_N * np.log(p_N) + (1 - y_N) * np.log(1 - p_N)).mean()
    z = weights / np.sqrt(np.diag(np.linalg.inv(hessian)))
    return z, cross / -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))


def test_labels_depend_on_recent_and_on_distant_events(corpus: Path) -> None:
    x_NF, y_N = features(corpus, categories(corpus))
    z, ne = fit(x_NF, y_N)
    assert z[1] > 20
    assert z[2] > 20
    assert fit(x_NF[:, [0, 2]], y_N)[1] > ne + 0.02  # without the recent events
    assert fit(x_NF[:, [0, 1]], y_N)[1] > ne + 0.02  # without the distant events


@pytest.mark.parametrize(("pool", "absent", "there"), [("recent", 1, 2), ("distant", 2, 1)])
def test_a_weight_of_zero_takes_the_dependence_away(tmp_path: Path, pool: str, absent: int, there: int) -> None:
    """With nothing hidden from the reader, that pool tells nothing the other does not tell."""
    open_book = {"prior": 0.01, "quality_weight": 0.0, "user_weight": 0.0}
    config = SyntheticConfig(items=1_000, users=150, **open_book, **{f"{pool}_weight": 0.0})
    write_synthetic(config, tmp_path)
    z, _ = fit(*features(tmp_path, make_items(config).membership_IC, prior=config.prior))
    assert z[there] > 20
    assert abs(z[absent]) < 4


def test_content_pays_and_the_oracle_is_the_floor(corpus: Path) -> None:
    recorded = json.loads((corpus / "synthetic.json").read_text())
    by_category = fit(*features(corpus, categories(corpus)))[1]
    assert 0.55 < recorded["ne_oracle"] < 0.7
    assert 0.93 < recorded["ne_user"] < 0.99
    assert recorded["ne_oracle"] + 0.05 < by_category < recorded["ne_user"] - 0.1


def test_impossible_sizes_are_refused() -> None:
    for changes, words in (
        ({"min_events": 0}, "1 <= min_events"),
        ({"median_events": 20_000}, "median_events <= max_events"),
        ({"items": 10}, "at least 4 items a category: 64, got 10"),
        ({"missing": 1.0}, "missing"),
        ({"users": 0}, "users"),
        ({"prior": 0.0}, "prior"),
        ({"idle_dims": -1}, "idle_dims must be at least 0, got -1"),
    ):
        with pytest.raises(DataError, match=words):
            SyntheticConfig(**changes)


def test_every_day_brings_new_items(tmp_path: Path) -> None:
    """Items are met only while they last, many at any time; so most of what is met late was never met early."""
    config = SyntheticConfig(items=6_000, users=150, median_events=80, max_events=600, lifetime_days=30)
    write_synthetic(config, tmp_path)
    release_I = make_items(config).release_I
    events = pq.read_table(tmp_path / "events.parquet")
    age_N = (events["timestamp"].to_numpy() - EPOCH) / SPAN - release_I[events["item_id"].to_numpy() - FIRST_ITEM_ID]
    assert age_N.min() >= 0 and age_N.max() <= 30 / 365
    late_N = events["timestamp"].to_numpy() > EPOCH + 0.8 * SPAN
    items_N = events["item_id"].to_numpy()
    assert len(np.unique(items_N[late_N])) > 500
    assert np.isin(items_N[late_N], items_N[~late_N]).mean() < 0.6
    with pytest.raises(DataError, match="lifetime_days must be 0 to 365"):
        SyntheticConfig(lifetime_days=400)


def test_a_category_without_a_living_item_shows_its_last_one() -> None:
    world = World(
        latent_ID=np.zeros((4, 1)),
        category_I=np.array([0, 1, 0, 1]),
        membership_IC=np.zeros((4, 2)),
        quality_I=np.zeros(4),
        release_I=np.array([0.1, 0.5, 0.3, 0.6]),
        popularity_I=np.ones(4),
    )
    category_N, share_N = np.array([0, 0, 0, 0, 1, 1]), np.array([0.05, 0.15, 0.35, 0.9, 0.2, 0.65])
    drawn = [_sample_alive(world, category_N, share_N, 0.1, np.full(6, u)) for u in (0.0, 0.999)]
    np.testing.assert_array_equal(drawn[0], [0, 0, 2, 2, 1, 3])
    np.testing.assert_array_equal(drawn[1], [0, 0, 2, 2, 1, 3])
    both = [_sample_alive(world, np.array([1]), np.array([0.61]), 0.2, np.array([u]))[0] for u in (0.1, 0.9)]
    assert both == [1, 3]
