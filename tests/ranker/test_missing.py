"""Events whose items are missing: their action and time count, their item is a zero vector; in training, alone, and served."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.packing import NO_SID
from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.arms import ARMS, Arm, ArmConfig
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import ServingRanker, WithWords, alone, export, requests_of
from sidrec_torchrec.ranker.stateful import StatefulServingRanker, UserStateUpdater
from tests.ranker.test_arms import ITEMS, make_inputs
from tests.ranker.test_serving import make_inputs as make_request
from tests.ranker.test_serving import make_model
from tests.ranker.test_targets import LENGTHS, make_batch, without_items
from tests.ranker.test_user_state import MODELS, asked, assert_same, part_of, whole
from tests.ranker.test_user_state import make_request as make_user_request

CPU = torch.device("cpu")
CONFIG = ArmConfig(table_dim=8, ngram_rows=100, table_dropout=0.0, digit_dropout=0.0)
SERVED = [name for name in ARMS if name not in ("none", "raw", "projected", "pq", "id", "hashed-id")]


def make_arm(name: str, folder) -> Arm:
    torch.manual_seed(0)
    return ARMS[name](make_inputs(ARMS[name], folder), CONFIG)


def make_ranker(arm: Arm, **config) -> Ranker:
    torch.manual_seed(1)
    config = RankerConfig(dim=8, num_heads=2, head_dims=(8,), dropout=0.0, **config)
    reader = config.reader(arm.sids[0] if arm.sids else None)
    items = reader.items(arm, CPU)
    ranker = Ranker(config, items, arm.dim, arm.sids[0] if reader.reads_codes else None, {}, CPU)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.3)
    return ranker


def items_of(has_item_N: Tensor) -> np.ndarray:
    item_N = np.random.default_rng(0).integers(0, ITEMS, sum(LENGTHS)).astype(np.int32)
    item_N[~has_item_N.numpy()] = -1
    return item_N


def with_items(batch: RankBatch, features, item_N: np.ndarray) -> RankBatch:
    """The batch with what travels with its events."""
    flat = [value.reshape(-1) for value in features.values(item_N).values()]
    lengths = [torch.tensor(LENGTHS) * (len(value) // len(item_N)) for value in flat]
    items = KeyedJaggedTensor(
        keys=list(features.keys),
        values=torch.cat(flat) if flat else torch.zeros(0),
        lengths=torch.cat(lengths) if lengths else torch.zeros(0, dtype=torch.int64),
        stride=len(LENGTHS),
    )
    return replace(batch, items=items, item_N=torch.from_numpy(item_N))


def run(ranker: Ranker, batch: RankBatch) -> tuple[Tensor, dict[str, Tensor]]:
    loss, output = ranker(batch)
    ranker.zero_grad()
    loss.backward()
    return output.prediction, {n: p.grad.clone() for n, p in ranker.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_reads_a_zero_vector(name, blocks, tmp_path):
    """Against a ranker that has some other item there, and whose vectors of these events are made zero by hand."""
    arm, batch = make_arm(name, tmp_path), without_items(make_batch())
    item_N = items_of(batch.has_item_N)
    ranker = make_ranker(arm, attention="vectors", blocks=blocks, block_events=3)
    prediction_SK, gradients = run(ranker, with_items(batch, arm, item_N))

    reader = ranker.head.reader.older if blocks else ranker.head.reader
    masked: list[int] = []

    def item_vectors(items, event_K, has_item_N=None):
        masked.append(int((~batch.has_item_N[event_K]).sum()))
        return type(reader).item_vectors(reader, items, event_K) * batch.has_item_N[event_K].unsqueeze(1)

    reader.item_vectors = item_vectors
    other_N = np.where(item_N < 0, 7, item_N)
    expected_SK, expected = run(ranker, with_items(batch, arm, other_N))
    assert masked[0] > 0
    torch.testing.assert_close(prediction_SK, expected_SK, rtol=0, atol=1e-6)
    assert gradients.keys() == expected.keys()
    for parameter, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[parameter], rtol=1e-4, atol=1e-6, msg=parameter)
    del reader.item_vectors
    assert (run(ranker, with_items(batch, arm, other_N))[0] - prediction_SK).abs().max() > 1e-4 or name == "none"


@pytest.mark.parametrize("name", list(ARMS))
def test_what_travels_and_what_is_stored(name, tmp_path):
    arm = make_arm(name, tmp_path)
    item_N = np.array([3, -1, 0, -1], np.int32)
    values, stored = arm.values(item_N), arm.stored(item_N)
    for key, value in values.items():
        assert value[[0, 2]].equal(arm.values(item_N[[0, 2]])[key])
        if value.is_floating_point() or key == "projection":
            assert not value[[1, 3]].any()
        if key.startswith("sid") and "coarse" not in key:
            assert (value[[1, 3]] == NO_SID).all()
    for column, value in stored.items():
        missing = value.take([1, 3])
        assert missing.null_count == 2 or missing.to_pylist() == [NO_SID] * 2
        assert value.take([0, 2]).to_pylist() == arm.stored(item_N[[0, 2]])[column].to_pylist()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *[
            (name, {"attention": "vectors", "blocks": blocks, "block_events": 3})
            for name in SERVED
            for blocks in (0, 1)
        ],
        *[(name, {"attention": "codes", "top_events": top}) for name in ("side", "learned-side") for top in (0, 3)],
        ("side", {"attention": "codes", "blocks": 1, "block_events": 3, "learned_queries": 2}),
    ],
)
def test_a_server_scores_as_training_does(name, config, tmp_path):
    arm, batch = make_arm(name, tmp_path), without_items(make_batch())
    ranker = make_ranker(arm, **config)
    words = WithWords(arm)
    batch = alone(with_items(batch, words, items_of(batch.has_item_N)), 100)
    assert not batch.has_item_N.all()
    with torch.no_grad():
        expected_S = ranker(batch)[1].prediction.squeeze(1)
        served_S = ServingRanker.of(ranker, arm)(**requests_of(batch, words.words(batch)))
    torch.testing.assert_close(served_S, expected_S, rtol=0, atol=1e-5)


@pytest.mark.parametrize("learned_queries", [0, 2])
def test_an_exported_ranker_takes_missing_items_of_events_alone(learned_queries, tmp_path):
    model = make_model(learned_queries=learned_queries)
    write(
        export(model),
        describe(model.sids, {"age": ("1", "2", "3"), "gender": ("F", "M")}),
        tmp_path / "r.pt2",
        compiled=False,
    )
    scorer = Scorer(tmp_path / "r.pt2")
    inputs = make_request(model, [300, 0, 7], [5, 2, 70])
    before_M = model(**inputs)
    inputs["history_NW"][::2] = NO_SID
    expected_M = model(**inputs)
    torch.testing.assert_close(scorer(**inputs), expected_M, rtol=0, atol=1e-6)
    assert (expected_M - before_M).abs().max() > 1e-3
    with pytest.raises(DataError, match=r"candidate_MW\[3, 0\] is -1, expected 0 to"):
        inputs["candidate_MW"][3] = NO_SID
        scorer(**inputs)


@torch.no_grad()
def test_states_count_events_without_items():
    model = MODELS[3]
    updater = UserStateUpdater(model)
    inputs = make_user_request(model, [40, 0, 9], [2, 1, 3])
    inputs["history_NW"][1::2] = NO_SID
    states = updater.append(updater.new(3), **whole(inputs))
    assert states.count_B.tolist() == [40, 0, 9]
    begin_B = inputs["offsets_B1"][:-1]
    middle_B = begin_B + inputs["offsets_B1"].diff() // 2
    half = updater.append(updater.new(3), **part_of(inputs, begin_B, middle_B))
    assert_same(updater.append(half, **part_of(inputs, middle_B, inputs["offsets_B1"][1:])), states)
    served = StatefulServingRanker(model).score(states, **asked(inputs))
    torch.testing.assert_close(served, model(**inputs), rtol=0, atol=1e-5)
