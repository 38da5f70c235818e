"""The converters on small files of invented rows in the official layouts."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.amazon_reviews import AmazonReviewsConfig, convert_amazon_reviews
from sidrec_torchrec.data.format import open_items, open_users, validate
from sidrec_torchrec.data.movielens import MovieLensConfig, convert_movielens
from sidrec_torchrec.data.text_source import HashedTfidf
from sidrec_torchrec.errors import DataError

# user, movie, rating, timestamp; users mixed, times not in order, and one tie
RATINGS = [(1, 7, 5, 300), (2, 3, 4, 50), (1, 3, 3, 100), (2, 9, 1, 50), (1, 9, 4, 200), (2, 7, 2, 40)]
EVENTS = [  # each user together, by time, the tie as it came; then the label and the rating
    (1, 3, 100, 0, 3.0),
    (1, 9, 200, 1, 4.0),
    (1, 7, 300, 1, 5.0),
    (2, 7, 40, 0, 2.0),
    (2, 3, 50, 1, 4.0),
    (2, 9, 50, 0, 1.0),
]
MOVIES = [
    (3, "The Crimson Clock: Part 2 (1994)", ["Comedy", "Drama"]),
    (7, "Déjà Rêve (2001)", ["Drama"]),
    (9, "Owl", []),
]


def write(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))


def csv_release(folder: Path) -> Path:
    write(
        folder / "ratings.csv", ["userId,movieId,rating,timestamp", *(f"{u},{m},{r}.0,{t}" for u, m, r, t in RATINGS)]
    )
    rows = [f'{m},"{title}",{"|".join(genres) or "(no genres listed)"}' for m, title, genres in MOVIES]
    write(folder / "movies.csv", ["movieId,title,genres", *rows])
    return folder


def dat_release(folder: Path) -> Path:
    write(folder / "ratings.dat", [f"{u}::{m}::{r}::{t}" for u, m, r, t in RATINGS])
    write(folder / "movies.dat", [f"{m}::{title}::{'|'.join(genres)}" for m, title, genres in MOVIES], "latin-1")
    write(folder / "users.dat", ["1::F::1::10::48067", "2::M::56::16::70072-1234"])
    return folder


def ml100k_release(folder: Path) -> Path:
    write(folder / "u.data", [f"{u}\t{m}\t{r}\t{t}" for u, m, r, t in RATINGS])
    write(folder / "u.genre", ["unknown|0", "Comedy|1", "Drama|2", ""])
    flags = {(): "1|0|0", ("Comedy", "Drama"): "0|1|1", ("Drama",): "0|0|1"}
    rows = [f"{m}|{title}|01-Jan-1994||http://example.org/{m}|{flags[tuple(genres)]}" for m, title, genres in MOVIES]
    write(folder / "u.item", rows, "latin-1")
    write(folder / "u.user", ["1|24|F|writer|85711", "2|53|M|other|94043"])
    return folder


def events(folder: Path) -> list[tuple]:
    table = pq.read_table(folder / "events.parquet")
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def error(action) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


# ---------------------------------------------------------------- MovieLens


@pytest.mark.parametrize("release", [csv_release, dat_release, ml100k_release])
def test_every_layout_of_movielens_gives_the_same_data(tmp_path: Path, release) -> None:
    out = tmp_path / "out"
    counts = convert_movielens(MovieLensConfig(input=release(tmp_path / "in"), out=out, text_dim=8))
    assert counts == {"items": 3, "events": 6, "label_rate": 0.5}
    assert sorted(events(out), key=lambda e: e[0]) == EVENTS
    items = pq.read_table(out / "items.parquet")
    assert items["item_id"].to_pylist() == [3, 7, 9]
    assert items["title"].to_pylist() == [title for _, title, _ in MOVIES]
    assert items["year"].to_pylist() == [1994, 2001, None]
    assert items["genres"].to_pylist() == [["Comedy", "Drama"], ["Drama"], []]
    assert open_items(out).source_dims == {"text_emb": 8}
    summary = validate(out)
    assert (summary["events"], summary["users"], summary["sources"]["text_emb"]["missing"]) == (6, 2, 0)


def test_movielens_users(tmp_path: Path) -> None:
    for release, columns in (
        (dat_release, {"user_id": [1, 2], "gender": ["F", "M"], "age": ["1", "56"], "occupation": ["10", "16"]}),
        (
            ml100k_release,
            {"user_id": [1, 2], "age": ["24", "53"], "gender": ["F", "M"], "occupation": ["writer", "other"]},
        ),
    ):
        out = tmp_path / release.__name__
        convert_movielens(MovieLensConfig(input=release(tmp_path / f"in-{release.__name__}"), out=out))
        assert pq.read_table(out / "users.parquet").to_pydict() == columns
    convert_movielens(MovieLensConfig(input=csv_release(tmp_path / "in"), out=tmp_path / "out"))
    assert open_users(tmp_path / "out") is None


def test_label_follows_min_rating(tmp_path: Path) -> None:
    config = MovieLensConfig(input=csv_release(tmp_path / "in"), out=tmp_path / "out", min_rating=5, text_dim=0)
    assert convert_movielens(config)["label_rate"] == pytest.approx(1 / 6)
    assert "text_emb" not in pq.read_schema(tmp_path / "out" / "items.parquet").names


def test_many_users_and_batches_stay_in_time_order(tmp_path: Path) -> None:
    """More users than buckets, and more ratings than one batch of the reader."""
    rng = np.random.default_rng(0)
    user_N, movie_N = rng.integers(1, 500, 120_000), rng.choice([3, 7, 9], 120_000)
    time_N = rng.integers(0, 1_000, 120_000)
    folder = csv_release(tmp_path / "in")
    rows = [f"{u},{m},{u % 5 + 0.5},{t}" for u, m, t in zip(user_N, movie_N, time_N, strict=True)]
    write(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *rows])
    convert_movielens(MovieLensConfig(input=folder, out=tmp_path / "out", text_dim=0))
    table = pq.read_table(tmp_path / "out" / "events.parquet")
    written_user_N = table["user_id"].to_numpy()
    assert (np.diff(written_user_N) != 0).sum() + 1 == np.unique(user_N).size  # each user stands together
    order = np.lexsort((np.arange(120_000), time_N, user_N))
    mine = np.argsort(written_user_N, kind="stable")
    for name, values_N in (("user_id", user_N), ("item_id", movie_N), ("timestamp", time_N)):
        np.testing.assert_array_equal(table[name].to_numpy()[mine], values_N[order])
    assert validate(tmp_path / "out")["events"] == 120_000
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["events.parquet", "items.parquet"]


def test_broken_movielens_files(tmp_path: Path) -> None:
    folder = csv_release(tmp_path / "in")

    def attempt(name: str, lines: list[str]) -> str:
        csv_release(folder)
        write(folder / name, lines)
        return error(lambda: convert_movielens(MovieLensConfig(input=folder, out=tmp_path / "out")))

    head = "userId,movieId,rating,timestamp"
    message = attempt("ratings.csv", [head, "1,3,4.0,100", "1,3,good,100"])
    assert message.startswith(f"{folder / 'ratings.csv'}: ") and "Row #3" in message and "'good'" in message
    assert "Row #2: Expected 4 columns, got 2" in attempt("ratings.csv", [head, "1,3"])
    assert "'rating'" in attempt("ratings.csv", ["userId,movieId,stars,timestamp", "1,3,4,5"])
    message = attempt("ratings.csv", [head, "1,3,4.0,100", "1,99,4.0,100"])
    assert message == f"{folder / 'ratings.csv'}: rating 1: movie 99 is not in the movie file"
    assert "no events are left" in attempt("ratings.csv", [head])
    assert f"{folder / 'movies.csv'}: line 1: expected movieId" in attempt("movies.csv", ["id,title,genres"])
    assert f"{folder / 'movies.csv'}: line 3: expected 3 fields" in attempt(
        "movies.csv", ["movieId,title,genres", "3,A,Drama", "seven,B,Drama"]
    )
    assert not (tmp_path / "out" / "items.parquet").exists()
    assert f"{tmp_path}: no MovieLens files" in error(
        lambda: convert_movielens(MovieLensConfig(input=tmp_path, out=tmp_path / "out"))
    )
    dat = dat_release(tmp_path / "dat")
    (dat / "movies.dat").unlink()
    message = error(lambda: convert_movielens(MovieLensConfig(input=dat, out=tmp_path / "out")))
    assert message.startswith(f"{dat / 'movies.dat'}: no such file")


# ---------------------------------------------------------------- embeddings computed elsewhere


def convert_with(tmp_path: Path, embeddings: Path) -> dict[str, list]:
    out = tmp_path / "out"
    convert_movielens(MovieLensConfig(input=csv_release(tmp_path / "in"), out=out, text_dim=0, embeddings=embeddings))
    table = pq.read_table(out / "items.parquet")
    return {name: table[name].to_pylist() for name in open_items(out).source_dims}


def test_npy_embeddings_follow_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "my-model.npy"
    np.save(path, np.array([[1, 2], [0, 0], [3, 4]], np.float64))
    assert convert_with(tmp_path, path) == {"my_model": [[1, 2], None, [3, 4]]}


def test_parquet_embeddings_are_joined_by_item_id(tmp_path: Path) -> None:
    path = tmp_path / "vectors.parquet"
    columns = {
        "item_id": pa.array([9, 1_000, 3], pa.int64()),
        "plot": pa.array([[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]]),
        "poster": pa.array([None, [0.5], [0.25]], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), path)
    assert convert_with(tmp_path, path) == {"plot": [[3, 4], None, [1, 2]], "poster": [[0.25], None, None]}


def test_embeddings_that_do_not_fit(tmp_path: Path) -> None:
    npy, parquet = tmp_path / "x.npy", tmp_path / "x.parquet"
    np.save(npy, np.zeros((2, 4), np.float32))
    message = error(lambda: convert_with(tmp_path, npy))
    assert message.startswith(f"{npy}: need floats of shape [3, d]") and message.endswith("float32 of shape [2, 4]")
    np.save(npy, np.array([[1.0], [1e6], [2.0]]))
    assert error(lambda: convert_with(tmp_path, npy)).startswith(f"{npy}: row 1: a value is not finite, or too large")
    assert "as .npy or .parquet" in error(lambda: convert_with(tmp_path, tmp_path / "x.txt"))

    def attempt(**columns) -> str:
        pq.write_table(pa.table(columns), parquet)
        return error(lambda: convert_with(tmp_path, parquet))

    assert "the file has movie, e" in attempt(movie=[3], e=[[1.0]])
    assert "column 'item_id' repeats a value" in attempt(item_id=[3, 3], e=[[1.0], [2.0]])
    assert "names none of the items" in attempt(item_id=[4], e=[[1.0]])
    assert "column 'e', vectors of one width needed, found widths [1, 2]" in attempt(
        item_id=[3, 7], e=[[1.0], [2.0, 3.0]]
    )
    assert "column 'e', row 1: a value is not finite" in attempt(item_id=[3, 7], e=[[1.0], [float("nan")]])


# ---------------------------------------------------------------- Amazon reviews

REVIEWS_2023 = [
    {"user_id": "AX", "parent_asin": "B2", "asin": "B2-red", "rating": 5.0, "timestamp": 3_000_999, "title": "good"},
    {"user_id": "AY", "parent_asin": "B1", "asin": "B1", "rating": 1.0, "timestamp": 1_000_000},
    {"user_id": "AX", "parent_asin": "B1", "asin": "B1", "rating": 3.0, "timestamp": 2_000_000},
    {"user_id": "AX", "parent_asin": "B3", "asin": "B3", "rating": 4.0, "timestamp": 1_000_000},
]
METADATA_2023 = [
    {
        "parent_asin": "B1",
        "title": "Steel ruler",
        "features": ["30 cm", "rust free"],
        "description": ["A ruler."],
        "categories": ["Tools", "Measuring"],
        "store": "Rulz",
    },
    {
        "parent_asin": "B9",
        "title": "Never reviewed",
        "features": [],
        "description": [],
        "categories": [],
        "store": None,
    },
    {"parent_asin": "B2", "title": "Beaker", "features": [], "description": [], "categories": [], "store": None},
]
REVIEWS_2018 = [
    {
        "reviewerID": r["user_id"],
        "asin": r["parent_asin"],
        "overall": r["rating"],
        "unixReviewTime": r["timestamp"] // 1000,
    }
    for r in REVIEWS_2023
]
METADATA_2018 = [
    {
        "asin": r["parent_asin"],
        "title": r["title"],
        "feature": r["features"],
        "description": r["description"],
        "category": r["categories"],
        "brand": r["store"] or "",
    }
    for r in METADATA_2023
]


def write_json_lines(path: Path, records: list[dict]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def amazon(folder: Path, reviews: list[dict], metadata: list[dict], suffix: str = "jsonl.gz", **options) -> dict:
    config = AmazonReviewsConfig(
        reviews=write_json_lines(folder / f"reviews.{suffix}", reviews),
        metadata=write_json_lines(folder / f"meta.{suffix}", metadata),
        out=folder / "out",
        **({"min_events": 1, "text_dim": 4} | options),
    )
    return convert_amazon_reviews(config)


@pytest.mark.parametrize(
    ("reviews", "metadata", "suffix"),
    [
        (REVIEWS_2023, METADATA_2023, "jsonl.gz"),
        (REVIEWS_2018, METADATA_2018, "json.gz"),
        (REVIEWS_2018, METADATA_2018, "json"),
    ],
)
def test_amazon_releases(tmp_path: Path, reviews, metadata, suffix) -> None:
    counts = amazon(tmp_path, reviews, metadata, suffix)
    assert counts == {"items": 3, "items_without_metadata": 1, "users": 2, "events": 4, "label_rate": 0.5}
    out = tmp_path / "out"
    items = pq.read_table(out / "items.parquet")
    assert items.drop_columns("text_emb").to_pylist() == [
        {"item_id": 0, "asin": "B2", "title": "Beaker", "categories": [], "brand": None, "text": "Beaker"},
        {
            "item_id": 1,
            "asin": "B1",
            "title": "Steel ruler",
            "categories": ["Tools", "Measuring"],
            "brand": "Rulz",
            "text": "Steel ruler 30 cm rust free A ruler.",
        },
        {"item_id": 2, "asin": "B3", "title": None, "categories": None, "brand": None, "text": ""},
    ]
    assert events(out) == [(0, 2, 1000, 1, 4.0), (0, 1, 2000, 0, 3.0), (0, 0, 3000, 1, 5.0), (1, 1, 1000, 0, 1.0)]
    assert pq.read_table(out / "user_ids.parquet").to_pydict() == {"user_id": [0, 1], "reviewer": ["AX", "AY"]}
    assert validate(out)["sources"] == {"text_emb": {"dim": 4, "missing": 1}}


def test_amazon_leaves_out_users_with_few_reviews(tmp_path: Path) -> None:
    counts = amazon(tmp_path, REVIEWS_2023, METADATA_2023, min_events=2)
    assert (counts["users"], counts["events"]) == (1, 3)
    assert "no events are left" in error(lambda: amazon(tmp_path, REVIEWS_2023, METADATA_2023, min_events=4))


def test_amazon_embeddings_are_joined_by_asin(tmp_path: Path) -> None:
    path = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"asin": ["B1", "B2"], "image_emb": [[1.0, 2.0], [3.0, 4.0]]}), path)
    amazon(tmp_path, REVIEWS_2023, METADATA_2023, embeddings=path)
    items = pq.read_table(tmp_path / "out" / "items.parquet")
    assert items["image_emb"].to_pylist() == [[3, 4], [1, 2], None]


def test_broken_amazon_files(tmp_path: Path) -> None:
    path = tmp_path / "reviews.jsonl"

    def attempt(change: dict | str) -> str:
        first = json.dumps(REVIEWS_2023[0])
        second = change if isinstance(change, str) else json.dumps(REVIEWS_2023[1] | change)
        path.write_text(f"{first}\n{second}\n")
        metadata = write_json_lines(tmp_path / "meta.jsonl", METADATA_2023)
        config = AmazonReviewsConfig(reviews=path, metadata=metadata, out=tmp_path / "out", min_events=1)
        return error(lambda: convert_amazon_reviews(config))

    assert attempt("{'asin': 'B1'}").startswith(f"{path}: line 2: not JSON")
    assert attempt("[1]") == f"{path}: line 2: not a JSON object"
    assert attempt({"user_id": None}).startswith(
        f"{path}: line 2: no user_id or reviewerID; it has user_id, parent_asin"
    )
    assert attempt({"rating": "five"}) == f"{path}: line 2: rating or overall is 'five', not a number"
    assert attempt(json.dumps({"user_id": "A", "asin": "B", "rating": 1})).startswith(
        f"{path}: line 2: no unixReviewTime or timestamp"
    )
    foreign = [{"parent_asin": "Z", "title": "Other"}]
    assert "describes none of the 3 reviewed items" in error(lambda: amazon(tmp_path, REVIEWS_2023, foreign))


def test_truncated_gzip(tmp_path: Path) -> None:
    metadata = write_json_lines(tmp_path / "meta.jsonl.gz", METADATA_2023)
    reviews = write_json_lines(tmp_path / "reviews.jsonl.gz", REVIEWS_2023 * 50)
    reviews.write_bytes(reviews.read_bytes()[:-30])
    config = AmazonReviewsConfig(reviews=reviews, metadata=metadata, out=tmp_path / "out")
    assert f"{reviews}: cannot be read past line" in error(lambda: convert_amazon_reviews(config))
    config = AmazonReviewsConfig(reviews=tmp_path / "none.gz", metadata=metadata, out=tmp_path / "out")
    assert error(lambda: convert_amazon_reviews(config)) == f"{tmp_path / 'none.gz'}: no such file"


# ---------------------------------------------------------------- the built-in text source


def test_texts_that_share_words_are_close() -> None:
    rng = np.random.default_rng(0)
    topics = [[f"{name}{i}" for i in range(30)] for name in ("alpha", "sigma", "theta")]
    texts = [" ".join(rng.choice(topics[t % 3], 12)) for t in range(90)]
    x_ND = HashedTfidf(8).fit(texts[:60]).transform(texts)
    assert x_ND.shape == (90, 8)
    assert x_ND.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(x_ND, axis=1), 1, atol=1e-5)
    likeness = x_ND[60:] @ x_ND[:60].T  # texts it was not fitted on
    same = (np.arange(60, 90)[:, None] - np.arange(60)) % 3 == 0
    assert likeness[same].min() > likeness[~same].max()


@pytest.mark.parametrize(("num_texts", "tolerance"), [(20, 1e-5), (200, 0.02)])
def test_text_source_is_the_truncated_svd_of_tf_idf(num_texts: int, tolerance: float) -> None:
    """Against NumPy's dense SVD of the same weighted counts: exact where the oversampled range holds every text, else
    all but 2% of the energy that can be kept."""
    rng = np.random.default_rng(1)
    vocabulary = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 8))) for _ in range(40)]
    texts = [" ".join(rng.choice(vocabulary, 6)) for _ in range(num_texts)]
    model = HashedTfidf(5, num_buckets=512).fit(texts)
    counts = np.zeros((num_texts, 512))
    for row, text in enumerate(texts):
        for bucket in model._buckets(text):
            counts[row, bucket] += 1
    idf = np.log((1 + num_texts) / (1 + (counts > 0).sum(0))) + 1
    weighed = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0) * idf
    weighed /= np.linalg.norm(weighed, axis=1, keepdims=True)
    kept = weighed @ model.basis_.numpy()
    energy = (np.linalg.svd(weighed, compute_uv=False)[:5] ** 2).sum()
    assert (1 - tolerance) * energy <= (kept**2).sum() <= energy * (1 + 1e-5)
    np.testing.assert_allclose(model.basis_.T @ model.basis_, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(model.transform(texts), kept / np.linalg.norm(kept, axis=1, keepdims=True), atol=1e-5)


def test_text_without_words_is_missing_and_fewer_texts_than_dimensions_are_fine() -> None:
    x_ND = HashedTfidf(6).fit(["one two", "two three"]).transform(["one two", "", "?!", "three"])
    assert np.linalg.norm(x_ND, axis=1).round(5).tolist() == [1, 0, 0, 1]
    assert (x_ND[:, 2:] == 0).all()


def test_text_source_does_not_depend_on_the_run() -> None:
    texts = [f"item number {i} of {i % 7} kinds" for i in range(40)]
    first, second = (HashedTfidf(4, max_fit=30).fit(texts).transform(texts) for _ in range(2))
    np.testing.assert_array_equal(first, second)
