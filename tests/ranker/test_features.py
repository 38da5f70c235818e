"""Features of events: read of the history by every reader, of the target only where they are known of it, and served alike."""

import dataclasses

import pytest
import torch
from torch import nn

from sidrec_torchrec.data.features import Feature, Features
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.metrics import RankingMetrics
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import READERS
from sidrec_torchrec.ranker.serving import ServingRanker, export, requests_of
from sidrec_torchrec.ranker.stateful import StatefulServingRanker, UserStateUpdater, export_stateful, export_updater
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_targets import DIM, LENGTHS, by_definition, make_batch, make_code_reader, make_events

CPU = torch.device("cpu")
FEATURES = Features(
    event=(Feature("device", ("phone", "tv")), Feature("hour", bounds=(6.0, 12.0, 18.0))),
    history=(Feature("dwell", bounds=(1.0, 10.0)),),
)
SIZES = [3, 5, 4]
READS = {
    "codes": {"attention": "codes", "learned_queries": 1},
    "top events": {"attention": "codes", "top_events": 3},
    "vectors": {"attention": "vectors", "learned_queries": 1},
    "blocks": {"attention": "codes", "blocks": 1, "block_events": 3},
}


def make_ranker(features: Features = FEATURES, **options) -> tuple[Ranker, torch.Tensor]:
    """With random weights, and the batch's items."""
    torch.manual_seed(0)
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), dropout=0.0, **options)
    events, (_, words_NW) = make_events(), make_code_reader(0)
    of_codes = READERS[config.attention].reads_codes
    sid = events if of_codes else None
    ranker = Ranker(config, nn.Identity(), events.embedding_dim, sid, {}, CPU, 1, features)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.25)
    items = words_NW if of_codes else torch.rand(sum(LENGTHS), events.embedding_dim)
    return ranker.eval(), items


def test_sizes_are_those_of_the_codes():
    assert list(FEATURES.sizes.values()) == SIZES and list(FEATURES.sizes) == ["device", "hour", "dwell"]
    assert Features.from_json(FEATURES.to_json()) == FEATURES


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_a_feature_moves_the_targets_that_read_it_and_its_own_target_only_if_it_is_known(options):
    batch, (ranker, items) = make_batch(SIZES), make_ranker(**options)
    _, before = ranker.head(batch, items, None)
    expected = list(by_definition(batch))
    moved_any = [False] * len(SIZES)
    for event in range(0, sum(LENGTHS), 2):
        for f, size in enumerate(SIZES):
            features_NF = batch.features_NF.clone()
            features_NF[event, f] = (features_NF[event, f] + 1) % size
            _, after = ranker.head(dataclasses.replace(batch, features_NF=features_NF), items, None)
            moved_S = (after.prediction != before.prediction).any(1).tolist()
            for moved, (_, own, reads) in zip(moved_S, expected, strict=True):
                is_known = own == event and f < len(FEATURES.event)
                if "top_events" not in options:  # else a score may move only which event is among the top
                    may_move = event in reads or is_known
                    assert moved <= may_move, (event, f)
                assert moved or not is_known
                moved_any[f] |= moved and event in reads
    assert all(moved_any)


@pytest.mark.parametrize("options", READS.values(), ids=READS)
def test_gradients_reach_the_codes_of_targets_and_no_others(options):
    batch, (ranker, items) = make_batch(SIZES), make_ranker(**options)
    ranker.head(batch, items, None)[0].backward()
    known = ranker.head.interaction.features.weight.grad
    rows = torch.unique(batch.features_NF[Targets.of(batch).event_S, :2] + torch.tensor([0, SIZES[0]]))
    assert (known.abs().sum(1) > 0).nonzero().squeeze(1).tolist() == rows.tolist()


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_a_code_that_training_never_had_says_nothing(options):
    """The rows of features start at zero: until they are trained, the ranker predicts what it would without them."""
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), dropout=0.0, **options)
    events, (_, words_NW) = make_events(), make_code_reader(0)
    of_codes = READERS[config.attention].reads_codes
    torch.manual_seed(0)
    ranker = Ranker(
        config, nn.Identity(), events.embedding_dim, events if of_codes else None, {}, CPU, 1, FEATURES
    ).eval()
    items = words_NW if of_codes else torch.rand(sum(LENGTHS), events.embedding_dim)
    batch = make_batch(SIZES)
    _, output = ranker.head(batch, items, None)
    _, other = ranker.head(dataclasses.replace(batch, features_NF=batch.features_NF * 0), items, None)
    torch.testing.assert_close(output.prediction, other.prediction, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_serving_predicts_what_the_ranker_does(options):
    if "blocks" in options:  # fewer would be others for a target that is asked for alone
        options = options | {"block_events": 1000}
    batch, (ranker, items) = make_batch(SIZES), make_ranker(**options)
    _, expected = ranker.head(batch, items, None)
    serving = ServingRanker(ranker, {"item": make_events().codec.spec})
    inputs = requests_of(batch, items, len(FEATURES.known))
    assert list(inputs) == list(serving.inputs) and inputs["known_MF"].shape[1] == 2
    torch.testing.assert_close(serving(**inputs), expected.prediction[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_exported_program_equals_the_module():
    batch, (ranker, items) = make_batch(SIZES), make_ranker(**READS["codes"])
    serving = ServingRanker(ranker, {"item": make_events().codec.spec})
    inputs = requests_of(batch, items, len(FEATURES.known))
    program = export(serving).module()
    torch.testing.assert_close(program(*inputs.values()), serving(**inputs), rtol=0, atol=1e-6)


def test_features_of_history_alone():
    batch, features = make_batch([4]), Features(history=FEATURES.history)
    ranker, items = make_ranker(features, **READS["codes"])
    _, output = ranker.head(batch, items, None)
    serving, inputs = ServingRanker(ranker, {"item": make_events().codec.spec}), requests_of(batch, items)
    assert inputs["known_MF"].shape[1] == 0
    torch.testing.assert_close(serving(**inputs), output.prediction[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_user_states_keep_the_features_of_events():
    """States made of parts of the histories, as a program and not, score what the ranker does; other codes are refused."""
    batch, (ranker, items) = make_batch(SIZES), make_ranker(**READS["codes"])
    model = ServingRanker(ranker, {"item": make_events().codec.spec})
    inputs = requests_of(batch, items, len(FEATURES.known))
    updater, stateful = UserStateUpdater(model), StatefulServingRanker(model)
    begin_B, end_B = inputs["offsets_B1"][:-1], inputs["offsets_B1"][1:]
    half_B = (begin_B + end_B) // 2
    states = updater.new(len(begin_B))
    programs = export_updater(updater).module(), export_stateful(stateful).module()
    for first_B, last_B in ((begin_B, half_B), (half_B, end_B)):
        place_N = torch.cat([torch.arange(first, last) for first, last in zip(first_B, last_B, strict=True)])
        new = {name: inputs[name][place_N] for name in ("history_NW", "action_N", "time_N")}
        new["offsets_B1"] = nn.functional.pad((last_B - first_B).cumsum(0), (1, 0))
        new["feature_NF"] = inputs["feature_NF"][place_N]
        by_program = programs[0](*states.tensors, *new.values())
        states = updater.append(states, **new)
        for ours, theirs in zip(states.tensors, by_program, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    asked = {name: value for name, value in inputs.items() if name != "num_events_B"}
    expected_M = model(**inputs | {"num_events_B": end_B - begin_B})
    torch.testing.assert_close(stateful.score(states, **asked), expected_M, rtol=0, atol=1e-5)
    torch.testing.assert_close(programs[1](*states.tensors, *asked.values()), expected_M, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="feature_NF is of shape None; .* device, hour, dwell"):
        updater.append(states, **{name: value for name, value in new.items() if name != "feature_NF"})
    with pytest.raises(DataError, match="feature dwell of event 0 is 9, expected 0 to 3"):
        wrong_NF = new["feature_NF"].clone()
        wrong_NF[0, 2] = 9
        updater.append(states, **new | {"feature_NF": wrong_NF})


@pytest.mark.parametrize("tasks", [1, 2])
def test_weights_multiply_loss_and_metrics(tasks):
    torch.manual_seed(1)
    weight_N = torch.rand(sum(LENGTHS)) * 3
    weight_N[::5] = 0
    plain = make_batch()
    event_S = Targets.of(plain).event_S
    batch = dataclasses.replace(
        plain, weight_N=weight_N, global_labels_K=weight_N[event_S].sum().repeat(tasks)
    )  # no label is missing
    events, (_, words_NW) = make_events(), make_code_reader(0)
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), dropout=0.0)
    ranker = Ranker(config, nn.Identity(), events.embedding_dim, events, {}, CPU, tasks)
    loss, output = ranker.head(batch, words_NW, None)
    p_SK, y_SK, w_S1 = output.prediction.double(), output.label.double(), weight_N[event_S].double().unsqueeze(1)
    terms_SK = -(y_SK * p_SK.log() + (1 - y_SK) * (1 - p_SK).log())
    means_K = (w_S1 * terms_SK).sum(0) / w_S1.sum()
    torch.testing.assert_close(loss.double(), means_K.sum(), rtol=1e-5, atol=1e-6)
    metrics = RankingMetrics(0, 1, CPU, tuple("ab"[:tasks]))
    metrics.update(output, torch.ones(len(event_S), dtype=torch.bool))
    values = metrics.compute()
    rate_K = (w_S1 * y_SK).sum(0) / w_S1.sum()
    entropy_K = -(rate_K * rate_K.log() + (1 - rate_K) * (1 - rate_K).log())
    for k, suffix in enumerate([""] if tasks == 1 else ["_a", "_b"]):
        if 0 < rate_K[k] < 1:
            assert values[f"ne_all{suffix}"] == pytest.approx(float(means_K[k] / entropy_K[k]), rel=1e-4)
        assert values[f"targets_all{suffix}"] == pytest.approx(float(w_S1.sum()))


def test_more_than_a_word_can_hold_is_refused():
    many = tuple(Feature(f"f{i}", bounds=tuple(map(float, range(1000)))) for i in range(6))
    with pytest.raises(SidrecError, match="63 bits .* f0 .1002 codes"):
        Features(event=many)
