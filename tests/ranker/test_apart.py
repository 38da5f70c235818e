"""Histories read apart: each as if it were all there is, its events once, in code space as over vectors, and served alike."""

import dataclasses

import pytest
import torch
from torch import nn

from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.data.features import Feature, Features
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.jobs.export import describe, write
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import READERS, ApartReader
from sidrec_torchrec.ranker.scorer import Scorer
from sidrec_torchrec.ranker.serving import ServingRanker, export, requests_of
from sidrec_torchrec.ranker.stateful import UserStateUpdater
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_features import READS
from tests.ranker.test_serving import SIZES, make_inputs
from tests.ranker.test_targets import DIM, LENGTHS, make_batch, make_code_reader, make_events

CPU = torch.device("cpu")
KIND = Feature("kind", ("cart", "click", "order"))
FEATURES = Features(event=(Feature("hour", bounds=(6.0, 12.0)), KIND))
H = len(KIND.values)


def make_ranker(features: Features = FEATURES, **options) -> tuple[Ranker, torch.Tensor]:
    """With random weights, and the batch's items."""
    torch.manual_seed(0)
    options = {"histories_by": "kind"} | options
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), dropout=0.0, **options)
    events, (_, words_NW) = make_events(), make_code_reader(0)
    of_codes = READERS[config.attention].reads_codes
    ranker = Ranker(config, nn.Identity(), events.embedding_dim, events if of_codes else None, {}, CPU, 1, features)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.25)
    return ranker.eval(), words_NW if of_codes else torch.rand(sum(LENGTHS), events.embedding_dim)


def make_kinds() -> RankBatch:
    """Events of all kinds and of none; the last row's are all of one kind, so that the others are empty there."""
    batch = make_batch([4, 1 + H])
    kind_N = batch.features_NF[:, 1]
    kind_N[-LENGTHS[-1] :] = 2
    assert set(kind_N.tolist()) == {0, 1, 2, 3}
    return batch


def only(batch: RankBatch, kind: int) -> tuple[RankBatch, torch.Tensor]:
    """The batch without other events of that kind than targets, which read it alone; and the places of the events that it keeps."""
    row_N = torch.repeat_interleave(batch.lengths_B)
    is_kind_N = batch.features_NF[:, 1] == kind
    is_target_N = torch.arange(sum(LENGTHS)) >= (batch.lengths_B.cumsum(0) - batch.num_targets_B)[row_N]
    kept_K = (is_kind_N | is_target_N).nonzero().squeeze(1)
    names = ("action_N", "weight_N", "features_NF", "timestamp_N", "order_N", "item_N")
    return dataclasses.replace(
        batch,
        lengths_B=torch.bincount(row_N[kept_K], minlength=len(LENGTHS)),
        visible_N=(batch.visible_N & is_kind_N)[kept_K],
        **{name: getattr(batch, name)[kept_K] for name in names},
    ), kept_K


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_each_history_is_read_as_if_it_were_all_there_is(options):
    """Against the inner reader over a batch from which all other events are taken out."""
    batch, (ranker, items) = make_kinds(), make_ranker(**options)
    reader = ranker.head.reader
    q_SD, pooled_SPD = reader(batch, items, Targets.of(batch))
    assert pooled_SPD.shape[1] == reader.num_pools == H * reader.readers[0].num_pools
    for kind, actual_SPD in enumerate(pooled_SPD.chunk(H, dim=1), start=1):
        alone, kept_K = only(batch, kind)
        alone_SD, expected_SPD = reader.readers[kind - 1](alone, items[kept_K], Targets.of(alone))
        if kind == 1:
            torch.testing.assert_close(q_SD, alone_SD, rtol=0, atol=1e-6)
        torch.testing.assert_close(actual_SPD, expected_SPD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_an_event_moves_its_own_history_and_an_event_of_no_kind_moves_none(options):
    batch, (ranker, items) = make_kinds(), make_ranker(**options)
    targets = Targets.of(batch)
    _, before_SPD = ranker.head.reader(batch, items, targets)
    moved_any = [False] * (1 + H)
    for event in targets.visible_V[::2].tolist():
        action_N = batch.action_N.clone()
        action_N[event] = 1 - action_N[event]
        _, after_SPD = ranker.head.reader(dataclasses.replace(batch, action_N=action_N), items, targets)
        kind = int(batch.features_NF[event, 1])
        moved = [
            bool((pool != was).any()) for pool, was in zip(after_SPD.chunk(H, 1), before_SPD.chunk(H, 1), strict=True)
        ]
        moved_any[kind] |= any(moved)
        assert not any(m for other, m in enumerate(moved, start=1) if other != kind)
    assert moved_any == [False, True, True, True]


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_events_of_one_kind_alone_are_read_as_without_histories(options):
    batch, one = make_batch([4, 2]), Features(event=(FEATURES.event[0], Feature("kind", ("click",))))
    batch.features_NF[:, 1] = 1
    apart, items = make_ranker(one, **options)
    plain, _ = make_ranker(one, **options, histories_by="")
    plain.load_state_dict({name.replace("reader.readers.0.", "reader."): v for name, v in apart.state_dict().items()})
    expected, actual = (ranker.head(batch, items, None)[1].prediction for ranker in (plain, apart))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_items_that_are_all_alike():
    batch, (ranker, items) = make_kinds(), make_ranker(**READS["vectors"])
    reader, targets = ranker.head.reader, Targets.of(batch)
    for actual, expected in zip(reader(batch, None, targets), reader(batch, items * 0, targets), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", READS.values(), ids=READS)
def test_gradients_are_finite_where_a_history_is_empty(options):
    batch, (ranker, items) = make_kinds(), make_ranker(**options)
    batch.features_NF[batch.features_NF[:, 1] == 1, 1] = 0  # nobody has any
    ranker.head(batch, items, None)[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ranker.head.parameters())


@pytest.mark.parametrize("options", READS.values(), ids=READS)
@torch.no_grad()
def test_serving_predicts_what_the_ranker_does(options):
    if "blocks" in options:  # fewer would be others for a target that is asked for alone
        options = options | {"block_events": 64}
    batch, (ranker, items) = make_kinds(), make_ranker(**options)
    _, expected = ranker.head(batch, items, None)
    serving = ServingRanker(ranker, {"item": make_events().codec.spec})
    inputs = requests_of(batch, items, len(FEATURES.known))
    torch.testing.assert_close(serving(**inputs), expected.prediction[:, 0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_exported_program_equals_the_module_whatever_the_sizes(tmp_path):
    """Over codes, with all that reads them at once, and histories of one kind alone, or none; the other rankers: tests/jobs/test_histories.py."""
    features = Features(history=(Feature("kind", ("click", "order")),))
    ranker, _ = make_ranker(features, attention="codes", learned_queries=1, top_events=3)
    spec = make_events().codec.spec
    serving = ServingRanker(ranker, {"item": spec})
    write(export(serving), describe({"item": spec}, {}, features=features), tmp_path / "r.pt2", compiled=False)
    scorer, generator = Scorer(tmp_path / "r.pt2"), torch.Generator().manual_seed(3)
    for lengths, candidates in SIZES.values():
        inputs = make_inputs(serving, lengths, candidates)
        inputs["known_MF"] = torch.zeros(sum(candidates), 0, dtype=torch.int64)
        for first, last in ((0, 2), (1, 1), (2, 2), (0, 0)):
            inputs["feature_NF"] = torch.randint(first, last + 1, (sum(lengths), 1), generator=generator)
            torch.testing.assert_close(scorer(**inputs), serving(**inputs), rtol=0, atol=1e-6)


def test_what_tells_no_histories_apart_is_refused():
    many = Feature("city", tuple(f"c{i}" for i in range(9)))
    features = Features(event=FEATURES.event, item=(KIND,), history=(many,))
    for name, message in (
        (
            "sort",
            "no such feature of events; these sequences have hour, kind, item.kind, city. .*--event-features sort",
        ),
        ("hour", "it is dense, .*'hour:category'"),
        ("city", "it has 9 values, and 8 histories at most"),
    ):
        with pytest.raises(SidrecError, match=f"histories by '{name}': {message}"):
            make_ranker(features, histories_by=name, attention="codes")
    with pytest.raises(SidrecError, match="these sequences have no features"):
        make_ranker(Features(), attention="codes")
    assert isinstance(make_ranker(features, histories_by="item.kind", attention="vectors")[0].head.reader, ApartReader)


def test_states_are_not_kept_of_them():
    ranker, _ = make_ranker(attention="codes", learned_queries=1)
    with pytest.raises(SidrecError, match="without --model.blocks and --model.histories-by"):
        UserStateUpdater(ServingRanker(ranker, {"item": make_events().codec.spec}))
