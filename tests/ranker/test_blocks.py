"""Blocks over the newest events: each target reads what it would read alone, and nothing that comes later moves it."""

import dataclasses

import pytest
import torch
from torch import nn

from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import READERS
from sidrec_torchrec.ranker.targets import Targets, newest_events
from tests.ranker.test_attention import attend_by_loops
from tests.ranker.test_targets import (
    DIM,
    LENGTHS,
    NUM_TARGETS,
    by_definition,
    make_batch,
    make_code_reader,
    make_events,
)

BLOCK_EVENTS, LEARNED, FEATURES = 3, 1, 5


def make_ranker(attention: str, **changes) -> tuple[Ranker, torch.Tensor]:
    """With random weights, and the batch's items."""
    torch.manual_seed(0)
    options = {"attention": attention, "learned_queries": LEARNED, "blocks": 2, "block_events": BLOCK_EVENTS} | changes
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), **options)
    if READERS[attention].reads_codes:
        events, (_, items) = make_events(), make_code_reader(0)
        ranker = Ranker(config, nn.Identity(), events.embedding_dim, events, {}, torch.device("cpu"))
    else:
        items = torch.randn(sum(LENGTHS), FEATURES)
        ranker = Ranker(config, nn.Identity(), FEATURES, None, {}, torch.device("cpu"))
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.5)
    return ranker.eval(), items


def another_item(items: torch.Tensor, event: int) -> torch.Tensor:
    changed = items.clone()
    changed[event] = (items[event] + 12345) % make_events().codec.spec.word_limits[0]
    return changed


def by_definition_newest(batch) -> list[int]:
    """Places of the events that blocks read."""
    newest, first = [], 0
    for length, count in zip(LENGTHS, NUM_TARGETS, strict=True):
        visible = [t for t in range(first, first + length) if batch.visible_N[t]]
        before = [t for t in visible if t < first + length - count]
        newest += before[-BLOCK_EVENTS:] + [t for t in visible if t >= first + length - count]
        first += length
    return newest


def test_newest_events_are_what_the_definition_says():
    batch = make_batch()
    newest = newest_events(batch, BLOCK_EVENTS).nonzero().squeeze(1).tolist()
    assert newest == by_definition_newest(batch)
    assert int(batch.visible_N.sum()) - len(newest) >= 5  # so that there are older ones too


@pytest.mark.parametrize("attention", list(READERS))
@torch.no_grad()
def test_each_target_reads_what_it_would_read_alone(attention):
    """The blocks run anew for every target, over the events before it and no others."""
    batch, (ranker, items) = make_batch(), make_ranker(attention)
    reader = ranker.head.reader
    q_SD, pooled_SQD = reader(batch, items, Targets.of(batch))
    newest = set(by_definition_newest(batch))
    older_batch = dataclasses.replace(
        batch, visible_N=torch.tensor([bool(v) and t not in newest for t, v in enumerate(batch.visible_N)])
    )
    plain_SD, older_SPD = reader.older(older_batch, items, Targets.of(older_batch))
    torch.testing.assert_close(q_SD, plain_SD)
    torch.testing.assert_close(pooled_SQD[:, : 1 + LEARNED], older_SPD)
    for s, (_, event, reads) in enumerate(by_definition(batch)):
        places = torch.tensor([t for t in reads if t in newest], dtype=torch.int64)
        time_T, action_T = batch.timestamp_N[places], batch.action_N[places]
        x_1TD = (reader.older.item_vectors(items, places) + reader.action(action_T)).unsqueeze(0)
        gaps_1TT = gap_bucket(time_T.unsqueeze(1) - time_T).unsqueeze(0)
        for block in reader.blocks:
            x_1TD = block(x_1TD, gaps_1TT, torch.ones(1, len(places), dtype=torch.bool))
        x_1TD = reader.norm(x_1TD)
        query_PD = torch.cat([q_SD[s : s + 1], reader.older.queries.seeds_KD])
        gaps_11T = gap_bucket(batch.timestamp_N[event] - time_T)[None, None]
        everything_11T = torch.ones(1, 1, len(places), dtype=torch.bool)
        arguments = (query_PD[None, None], x_1TD, action_T[None, :, None], gaps_11T, everything_11T, LEARNED)
        expected_PD = attend_by_loops(reader.attention, *arguments)[0, 0]
        torch.testing.assert_close(pooled_SQD[s, 1 + LEARNED :], expected_PD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", list(READERS))
@torch.no_grad()
def test_a_prediction_depends_on_exactly_what_its_target_may_read(attention):
    """So no later event moves it, its own label neither, and no event that is not visible."""
    batch, (ranker, items) = make_batch(), make_ranker(attention)
    targets, expected = Targets.of(batch), list(by_definition(batch))

    def outputs(changed_batch, changed_items):
        q_SD, pooled_SQD = ranker.head.reader(changed_batch, changed_items, targets)
        _, predicted = ranker.head(changed_batch, changed_items, None)
        return torch.cat([q_SD, pooled_SQD.flatten(1)], dim=1), predicted.prediction

    read_before, before = outputs(batch, items)
    for event in range(0, sum(LENGTHS), 3):
        flipped_N = batch.action_N.clone()
        flipped_N[event] = 1 - flipped_N[event]
        flipped = dataclasses.replace(batch, action_N=flipped_N)
        in_history = torch.tensor([event in reads for *_, reads in expected])
        is_own = torch.tensor([event == own for _, own, _ in expected])
        for changed, may_move in (
            (outputs(flipped, items), in_history),
            (outputs(batch, another_item(items, event)), in_history | is_own),
        ):
            moved = ((changed[0] - read_before).abs() > 1e-6).any(1)
            assert moved.equal(may_move), event
            torch.testing.assert_close(changed[1][~may_move], before[~may_move], rtol=0, atol=1e-6)


@pytest.mark.parametrize("attention", list(READERS))
def test_nothing_new_and_nothing_old(attention):
    """Rows without any visible event, and blocks that leave nothing to the other reader."""
    batch = make_batch()
    unseen = dataclasses.replace(batch, visible_N=torch.zeros_like(batch.visible_N))
    for some_batch, block_events in ((unseen, BLOCK_EVENTS), (batch, 1000)):
        ranker, items = make_ranker(attention, block_events=block_events)
        loss, output = ranker.head(some_batch, items, None)
        loss.backward()
        assert output.prediction.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ranker.head.parameters())
