"""The tokenizer's training: better than its start, the same on two processes, and plain words on bad input."""

import dataclasses
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.synthetic_items import SyntheticConfig, items_table, make_items
from sidrec_torchrec.errors import DataError, DivergedError, RunMismatchError, SidrecError
from sidrec_torchrec.files import read_json
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionOptions
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import train_tokenizer
from sidrec_torchrec.jobs.train_tokenizer import TrainTokenizerConfig

OPTIONS = {field.name for field in dataclasses.fields(VQFusionOptions)}
DPCA, RQ = QuantizerConfig(stages="ternary*10"), QuantizerConfig(kind="rq", stages="onehot:8*3")


def write_items(folder: Path, num_items: int) -> Path:
    """Items with two sources, a category and tags; no events."""
    config = SyntheticConfig(items=num_items, categories=6, text_dim=16, image_dim=12, noise=0.05, missing=0.1)
    pq.write_table(items_table(config, make_items(config)), folder / "items.parquet")
    return folder


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    return write_items(tmp_path_factory.mktemp("items"), 600)


def make_config(items: Path, out: Path, **changes) -> TrainTokenizerConfig:
    values = {
        "data": items,
        "out": out,
        "target": ("category", "tags"),
        "epochs": 2,
        "batch_size": 64,
        "validation_fraction": 0.2,
    }
    options = {"latent_dim": 16, "hidden_dim": 64, "quantizer": DPCA}
    options |= {name: changes.pop(name) for name in OPTIONS & changes.keys()}
    return TrainTokenizerConfig(model=VQFusionOptions(**options), **values | changes)


def changed_items(items: Path, folder: Path, column: str, values: list) -> Path:
    """A copy of the data with another column."""
    folder.mkdir()
    table = pq.read_table(items / "items.parquet")
    place = table.schema.get_field_index(column)
    table = table.set_column(place, column, pa.array(values, table.schema.field(column).type))
    pq.write_table(table, folder / "items.parquet")
    return folder


def scaled_items(items: Path, folder: Path, scale: float) -> Path:
    """A copy of the data with other ``image_emb``: in float32, which holds larger and smaller numbers than float16."""
    folder.mkdir()
    table = pq.read_table(items / "items.parquet")
    values = [vector and [x * scale for x in vector] for vector in vectors(items, "image_emb")]
    place = table.schema.get_field_index("image_emb")
    pq.write_table(
        table.set_column(place, "image_emb", pa.array(values, pa.list_(pa.float32()))), folder / "items.parquet"
    )
    return folder


def vectors(items: Path, column: str) -> list:
    return pq.read_table(items / "items.parquet")[column].to_pylist()


@pytest.mark.parametrize("quantizer", [DPCA, RQ], ids=["dpca", "rq"])
def test_training_beats_its_closed_form_start(quantizer, tmp_path):
    """On items it never saw, every source."""
    data = write_items(tmp_path, 3_000)  # residual VQ learns nothing from hundreds: the start is kept
    changes = {"target": (), "epochs": 8, "batch_size": 32, "learning_rate": 2e-3, "dropout": 0.1}
    config = make_config(data, tmp_path / "run", quantizer=quantizer, **changes)
    result = train_tokenizer.main(config)
    start, best = result["course"][0], min(result["course"], key=lambda losses: losses["total"])
    for source in ("text_emb", "image_emb"):
        assert best[source] < 0.98 * start[source]
    assert_saved(best, result, config)


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
@pytest.mark.parametrize("quantizer", [DPCA, RQ], ids=["dpca", "rq"])
def test_targets_are_learned_from_the_same_digits(quantizer, weighting, items, tmp_path):
    """Far better than how often each class occurs, which is the start, at a small price in reconstruction."""
    changes = {"quantizer": quantizer, "weighting": weighting, "epochs": 8, "learning_rate": 3e-3}
    config = make_config(items, tmp_path / "run", **changes)
    result = train_tokenizer.main(config)
    start, best = result["course"][0], min(result["course"], key=lambda losses: losses["total"])
    assert best["category"] < 0.5 * start["category"]
    assert best["tags"] < 0.8 * start["tags"]
    for source in ("text_emb", "image_emb"):
        assert best[source] < 1.15 * start[source]
    assert_saved(best, result, config)
    weights = torch.load(tmp_path / "run" / "tokenizer" / "tokenizer.pt").get("weights.log_variance_K")
    assert (weights is None) == (weighting == "fixed")
    if (
        weights is not None
    ):  # text, image, category, tags; on the way from 0 to log L and log 2L, below 0 but for category
        assert (weights[[0, 1, 3]] < 0).all()


def assert_saved(best: dict, result: dict, config: TrainTokenizerConfig) -> None:
    """What is saved and reported is the best epoch."""
    report = result["validation"]
    for source in ("text_emb", "image_emb"):
        assert report["reconstruction"][source][-1] == pytest.approx(best[source], rel=1e-2)
    for target in config.target:
        assert report["target_loss"][target][-1] == pytest.approx(best[target], rel=1e-2)
    if config.target:
        assert report["accuracy"]["category"][-1] > 0.7  # of six classes
    assert Tokenizer.load(config.out / "tokenizer").codec.spec.fingerprint == result["fingerprint"]


def test_task_weights_shift_what_is_kept(items, tmp_path):
    kept = {}
    for name, weights in (("text", {"image_emb": 0.01}), ("image", {"text_emb": 0.01})):
        config = make_config(items, tmp_path / name, weights=weights, target=(), epochs=8, learning_rate=3e-3)
        kept[name] = train_tokenizer.main(config)["validation"]["reconstruction"]
    assert kept["text"]["text_emb"][-1] < kept["image"]["text_emb"][-1]
    assert kept["image"]["image_emb"][-1] < kept["text"]["image_emb"][-1]


def train_all(configs: list[TrainTokenizerConfig]) -> list[dict]:
    return [train_tokenizer.main(config) for config in configs]


def test_two_processes_equal_one(items, tmp_path, run_distributed):
    """Without dropout and prefixes, which every process draws for itself: the same losses, within 0.2 percent."""

    def configs(name: str) -> list[TrainTokenizerConfig]:
        # 445 items train: the last batch is a single one, which leaves one of the processes without any
        changes = {"dropout": 0, "prefix_share": 0, "validation_fraction": 0.25, "batch_size": 74}
        return [make_config(items, tmp_path / name / q.kind, quantizer=q, **changes) for q in (DPCA, RQ)]

    alone = train_all(configs("one"))
    first, second = run_distributed(train_all, 2, configs("two"))
    assert first == second
    for one, two in zip(alone, first, strict=True):
        assert one["validation"]["items"] == 600 - 445
        for own, its in zip(one["course"], two["course"], strict=True):
            assert own == pytest.approx(its, rel=2e-3)
        assert two["course"][2] != pytest.approx(two["course"][0], rel=2e-2)  # it did train


def test_finished_run_is_read_back(items, tmp_path, monkeypatch):
    config = make_config(items, tmp_path / "run", epochs=1)
    result = train_tokenizer.main(config)
    assert result == read_json(tmp_path / "run" / "metrics.json")

    def fail(*args):
        raise AssertionError("trained again")

    monkeypatch.setattr(train_tokenizer, "_train", fail)
    assert train_tokenizer.main(config) == result
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert train_tokenizer.main(make_config(items, tmp_path / "moved", epochs=1)) == result
    with pytest.raises(RunMismatchError, match="holds another run .*learning_rate was 0.001, is 0.01"):
        train_tokenizer.main(make_config(items, tmp_path / "moved", epochs=1, learning_rate=0.01))


def test_excluded_items_change_nothing(items, tmp_path):
    """Whatever stands in the rows of excluded items, the result is the same to the last bit."""
    rows = range(0, 600, 4)
    ids = pq.read_table(items / "items.parquet")["item_id"].to_pylist()
    pq.write_table(pa.table({"item_id": [ids[row] for row in rows]}), tmp_path / "cold.parquet")
    wild = vectors(items, "text_emb")
    for row in rows:
        wild[row] = [100.0, -100.0] * 8
    changed = changed_items(items, tmp_path / "changed", "text_emb", wild)
    results = [
        train_tokenizer.main(make_config(data, tmp_path / name, exclude=tmp_path / "cold.parquet"))
        for name, data in (("a", items), ("b", changed))
    ]
    assert results[0] == results[1]
    seen = train_tokenizer.main(make_config(changed, tmp_path / "c"))
    assert seen["fingerprint"] != results[0]["fingerprint"]


def test_no_item_left(items, tmp_path):
    pq.write_table(pq.read_table(items / "items.parquet", columns=["item_id"]), tmp_path / "cold.parquet")
    with pytest.raises(DataError, match=r"items\.parquet: no item is left to train on"):
        train_tokenizer.main(make_config(items, tmp_path / "run", exclude=tmp_path / "cold.parquet"))


def test_without_validation_items_the_training_items_choose(items, tmp_path):
    result = train_tokenizer.main(make_config(items, tmp_path / "run", validation_fraction=0.0, epochs=1))
    assert result["validation"]["items"] == 600


def test_value_that_is_not_finite_is_named(items, tmp_path):
    values = vectors(items, "image_emb")
    row = next(row for row, vector in enumerate(values) if row > 300 and vector is not None)
    values[row][5] = float("nan")
    data = changed_items(items, tmp_path / "data", "image_emb", values)
    with pytest.raises(DataError, match=rf"items\.parquet: column 'image_emb', row {row} .*value 5 is nan"):
        train_tokenizer.main(make_config(data, tmp_path / "run"))


def test_source_missing_in_every_item_is_named(items, tmp_path):
    data = changed_items(items, tmp_path / "data", "image_emb", [None] * 600)
    with pytest.raises(DataError, match="column 'image_emb'.* holds no vector in any row; drop it"):
        train_tokenizer.main(make_config(data, tmp_path / "run"))


@pytest.mark.parametrize("scale", [1e20, 1e-10])
def test_source_too_large_or_too_small_for_float32_is_named(scale, items, tmp_path):
    """Its standardized vectors would be zeros, and SIDs would leave it out without a word."""
    data = scaled_items(items, tmp_path / "data", scale)
    with pytest.raises(DataError, match="column 'image_emb': its vectors have length .*scale them to about 1"):
        train_tokenizer.main(make_config(data, tmp_path / "run"))


@pytest.mark.parametrize("scale", [1e15, 1e-4])
def test_a_source_s_scale_means_nothing(scale, items, tmp_path):
    data = scaled_items(items, tmp_path / "data", scale)
    course = train_tokenizer.main(make_config(data, tmp_path / "run", epochs=0))["course"]
    start = train_tokenizer.main(make_config(items, tmp_path / "plain", epochs=0))["course"]
    assert course[0] == pytest.approx(start[0], rel=1e-3)


def test_weights_that_cannot_be_are_refused(items, tmp_path):
    with pytest.raises(SidrecError, match="weight of unknown task 'audio_emb'; there are text_emb"):
        train_tokenizer.main(make_config(items, tmp_path / "a", weights={"audio_emb": 1.0}))
    with pytest.raises(SidrecError, match="weight of 'text_emb' must be at least 0 and finite, got -1"):
        train_tokenizer.main(make_config(items, tmp_path / "b", weights={"text_emb": -1.0}))


def test_nothing_left_to_fuse(items, tmp_path):
    with pytest.raises(
        DataError, match="no column of float lists to fuse besides those to predict, text_emb, image_emb"
    ):
        train_tokenizer.main(make_config(items, tmp_path / "run", predict=("text_emb", "image_emb")))


def test_unknown_names_are_refused(items, tmp_path):
    with pytest.raises(DataError, match="no source 'audio_emb'; available: 'text_emb', 'image_emb'"):
        train_tokenizer.main(make_config(items, tmp_path / "a", source=("audio_emb",)))
    with pytest.raises(DataError, match="no target 'brand'"):
        train_tokenizer.main(make_config(items, tmp_path / "b", target=("brand",)))


@pytest.mark.parametrize("learning_rate", [1e12, 1e30])
def test_diverging_training_stops_in_words(learning_rate, items, tmp_path):
    with pytest.raises(DivergedError, match="training diverged in epoch 1, batch .*lower the learning rate"):
        train_tokenizer.main(make_config(items, tmp_path / "run", learning_rate=learning_rate))
    assert not (tmp_path / "run" / "tokenizer").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()
