"""Top events: which are read one by one, what of them is pooled, and that nothing else moves it."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.pair_attention import PairAttention
from sidrec_torchrec.ranker.readers import CodeReader
from sidrec_torchrec.ranker.serving import ServingRanker, requests_of
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_targets import DIM, LENGTHS, by_definition, make_batch, make_code_reader, make_events

CPU = torch.device("cpu")
HEADS, TOP, LEARNED = 2, 4, 1


def make_ranker(**changes) -> tuple[Ranker, torch.Tensor]:
    """With random weights, and the batch's packed SIDs."""
    torch.manual_seed(3)
    options = {"top_events": TOP, "learned_queries": LEARNED} | changes
    config = RankerConfig(dim=DIM, num_heads=HEADS, head_dims=(16,), **options)
    events, (_, words_NW) = make_events(), make_code_reader(0)
    ranker = Ranker(config, nn.Identity(), events.embedding_dim, events, {}, CPU)
    with torch.no_grad():
        for parameter in ranker.parameters():
            parameter.normal_(std=0.5)
    return ranker.eval(), words_NW


def scores_by_hand(reader: CodeReader, batch, words_NW, event: int, reads: list[int]) -> torch.Tensor:
    """Of decoded events, summed over heads: float [events]."""
    attention = reader.attention
    x_ND = reader.item_vectors(words_NW, torch.arange(len(words_NW)))
    query_Hd = attention.query(x_ND[event]).unflatten(0, (HEADS, -1)) * (DIM // HEADS) ** -0.5
    key_THd = attention.key(x_ND[reads]).unflatten(1, (HEADS, -1))
    gap_T = gap_bucket(batch.timestamp_N[event] - batch.timestamp_N[reads])
    bias_TH = attention.bias_UH[batch.action_N[reads]] + attention.bias_UH[-GAP_BUCKETS:][gap_T.long()]
    return (torch.einsum("hd,thd->th", query_Hd, key_THd) + bias_TH).sum(1)


def top_by_hand(reader: CodeReader, batch, words_NW, event: int, reads: list[int]) -> list[int]:
    score_T = scores_by_hand(reader, batch, words_NW, event, reads)
    return [reads[t] for t in score_T.argsort(descending=True)[:TOP].tolist()]


def pool_by_hand(pairs: PairAttention, q_D, x_KD, action_K, gap_K) -> torch.Tensor:
    """What a target pools of its events, by loops: float [D]."""
    pooled_Hd, d = torch.zeros(HEADS, DIM // HEADS), DIM // HEADS
    z = [
        F.relu(
            pairs.item.weight @ x_D
            + pairs.product.weight @ (x_D * q_D)
            + pairs.query.weight @ q_D
            + pairs.query.bias
            + pairs.action.weight[action]
            + pairs.gap.weight[gap]
        )
        for x_D, action, gap in zip(x_KD, action_K.tolist(), gap_K.tolist(), strict=True)
    ]
    for h in range(HEADS):
        weights = [(pairs.weight.weight[h] @ z_D).exp() for z_D in z]
        total = sum(weights) + pairs.sink_H[h].exp()
        for weight, z_D in zip(weights, z, strict=True):
            pooled_Hd[h] += weight / total * z_D[h * d : (h + 1) * d]
    return pairs.output.weight @ pooled_Hd.flatten() + pairs.output.bias


@torch.no_grad()
def test_the_events_with_the_highest_scores_are_read_and_pooled_by_the_definition():
    batch, (ranker, words_NW) = make_batch(), make_ranker()
    reader, targets = ranker.head.reader, Targets.of(batch)
    q_SD, pooled_SPD = reader(batch, words_NW, targets)
    assert pooled_SPD.shape == (len(q_SD), 1 + LEARNED + 1, DIM)
    event_SK = reader.attention.top_events(
        q_SD,
        words_NW[targets.visible_V],
        targets.begin_S,
        targets.end_S,
        batch.action_N[targets.visible_V].unsqueeze(1),
        batch.timestamp_N[targets.visible_V],
        batch.timestamp_N[targets.event_S],
        k=TOP,
    )
    sizes = set()
    for s, (_, event, reads) in enumerate(by_definition(batch)):
        top = top_by_hand(reader, batch, words_NW, event, reads)
        sizes.add(len(top))
        found_K = event_SK[s][event_SK[s] >= 0]
        assert targets.visible_V[found_K].tolist() == top
        assert (event_SK[s][len(top) :] == -1).all()
        gap_K = gap_bucket(batch.timestamp_N[event] - batch.timestamp_N[top])
        x_KD = reader.item_vectors(words_NW, torch.tensor(top, dtype=torch.int64))
        expected_D = pool_by_hand(reader.pairs, q_SD[s], x_KD, batch.action_N[top], gap_K)
        torch.testing.assert_close(pooled_SPD[s, -1], expected_D, rtol=1e-4, atol=1e-5)
    assert {0, 1, TOP} <= sizes  # none, fewer than K, and K


@torch.no_grad()
def test_other_pools_are_what_they_are_without():
    batch, (ranker, words_NW), (plain, _) = make_batch(), make_ranker(), make_ranker(top_events=0)
    plain.head.reader.load_state_dict(ranker.head.reader.state_dict(), strict=False)
    q_SD, pooled_SPD = ranker.head.reader(batch, words_NW, Targets.of(batch))
    plain_SD, plain_SPD = plain.head.reader(batch, words_NW, Targets.of(batch))
    assert torch.equal(q_SD, plain_SD) and torch.equal(pooled_SPD[:, :-1], plain_SPD)


@torch.no_grad()
def test_an_event_moves_what_is_pooled_only_where_it_is_or_comes_among_the_top():
    """So no later event does, the target's own label neither, and no event that is not visible."""
    batch, (ranker, words_NW) = make_batch(), make_ranker(dropout=0.0)
    reader, targets, expected = ranker.head.reader, Targets.of(batch), list(by_definition(batch))
    _, before_SPD = reader(batch, words_NW, targets)
    top_before = [top_by_hand(reader, batch, words_NW, event, reads) for _, event, reads in expected]
    stayed = moved = 0
    for changed in range(0, sum(LENGTHS), 3):
        action_N = batch.action_N.clone()
        action_N[changed] = 1 - action_N[changed]
        flipped = dataclasses.replace(batch, action_N=action_N)
        words = words_NW.clone()
        words[changed] = (words[changed] + 12345) % make_events().codec.spec.word_limits[0]
        for some_batch, some_words in ((flipped, words_NW), (batch, words)):
            _, after_SPD = reader(some_batch, some_words, targets)
            moved_S = ((after_SPD - before_SPD)[:, -1].abs() > 1e-5).any(1)
            for s, (_, event, reads) in enumerate(expected):
                if event == changed and some_words is words:
                    continue  # the target asks for something else
                top = top_by_hand(reader, some_batch, some_words, event, reads)
                assert bool(moved_S[s]) == (changed in top or changed in top_before[s]), (changed, s)
                stayed += changed in reads and not moved_S[s]
                moved += bool(moved_S[s])
    assert stayed > 20 and moved > 20


def test_gradients_reach_all_of_the_module_and_the_vectors_it_reads():
    torch.manual_seed(0)
    pairs = PairAttention(DIM, HEADS, 3).double()
    with torch.no_grad():
        for parameter in pairs.parameters():
            parameter.normal_(std=0.5)
    query_MD = torch.randn(5, DIM, dtype=torch.float64, requires_grad=True)
    item_MKD = torch.randn(5, TOP, DIM, dtype=torch.float64, requires_grad=True)
    action_MK, gap_MK = torch.randint(3, (5, TOP)), torch.randint(GAP_BUCKETS, (5, TOP))
    is_event_MK = torch.arange(TOP) < torch.tensor([[0], [1], [2], [TOP], [TOP]])
    names, values = zip(*pairs.named_parameters(), strict=True)

    def pool(query_MD, item_MKD, *values):
        arguments = (query_MD, item_MKD, action_MK.unsqueeze(2), gap_MK, is_event_MK)
        return torch.func.functional_call(pairs, dict(zip(names, values, strict=True)), arguments)

    assert torch.autograd.gradcheck(pool, (query_MD, item_MKD, *values), fast_mode=True)
    pool(query_MD, item_MKD, *values).square().sum().backward()
    assert (item_MKD.grad != 0).any(2).equal(is_event_MK)


def test_what_is_pooled_trains_the_vectors_of_events_but_not_the_choice():
    batch, (ranker, words_NW) = make_batch(), make_ranker()
    reader = ranker.head.reader
    _, pooled_SPD = reader(batch, words_NW, Targets.of(batch))
    pooled_SPD[:, -1].square().sum().backward()
    assert all(p.grad is not None and (p.grad != 0).any() for p in reader.pairs.parameters())
    assert (reader.attention.vectors.linear.weight.grad != 0).any()
    for linear in (reader.attention.query, reader.attention.key):  # zeros come from the pools beside it
        assert (linear.weight.grad == 0).all()


@pytest.mark.parametrize("top_events", [TOP, 1000])
def test_no_history_and_fewer_events_than_places(top_events):
    batch, (ranker, words_NW) = make_batch(), make_ranker(top_events=top_events)
    unseen = dataclasses.replace(batch, visible_N=torch.zeros_like(batch.visible_N))
    for some_batch in (unseen, batch):
        ranker.zero_grad()
        loss, output = ranker.head(some_batch, words_NW, None)
        loss.backward()
        assert output.prediction.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in ranker.head.parameters())
    with torch.no_grad():
        _, pooled_SPD = ranker.head.reader(unseen, words_NW, Targets.of(unseen))
    bias_D = ranker.head.reader.pairs.output.bias
    torch.testing.assert_close(pooled_SPD[:, -1], bias_D.detach().expand(len(pooled_SPD), -1))


@pytest.mark.parametrize("learned_queries", [0, LEARNED])
@torch.no_grad()
def test_serving_predicts_what_the_ranker_does(learned_queries):
    batch, (ranker, words_NW) = make_batch(), make_ranker(learned_queries=learned_queries)
    _, expected = ranker.head(batch, words_NW, None)
    serving = ServingRanker(ranker, {"sid": make_events().codec.spec})
    inputs = requests_of(batch, words_NW)
    # both are within 3e-6 of float64, and add in another order; sidrec export allows 1e-5
    torch.testing.assert_close(serving(**inputs), expected.prediction[:, 0], rtol=0, atol=1e-5)
    assert expected.prediction.std() > 0.01
    no_candidates = inputs | {name: inputs[name][:0] for name in ("candidate_MW", "request_M")}
    assert serving(**no_candidates).shape == (0,)


@torch.no_grad()
def test_blocks_leave_older_events_to_choose_from():
    batch, (ranker, words_NW) = make_batch(), make_ranker(blocks=1, block_events=3)
    reader = ranker.head.reader
    q_SD, pooled_SPD = reader(batch, words_NW, Targets.of(batch))
    assert pooled_SPD.shape == (len(q_SD), reader.num_pools, DIM) == (len(q_SD), 2 * (1 + LEARNED) + 1, DIM)


def test_readers_that_cannot_find_them_are_refused():
    for attempt in (
        lambda: RankerConfig(attention="vectors", top_events=1),
        lambda: RankerConfig(top_events=1).reader(None),
    ):
        with pytest.raises(SidrecError, match="top_events .* attention to codes"):
            attempt()
    assert RankerConfig(top_events=1).reader(make_events()) is CodeReader
