"""What each target may read, against the definition; and the two readers."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.batches import RankBatch
from sidrec_torchrec.ops.code_attention import GAP_BUCKETS, gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Context
from sidrec_torchrec.ranker.readers import CodeReader
from sidrec_torchrec.ranker.targets import Targets
from sidrec_torchrec.side.expansion import SIDEConfig

LENGTHS, NUM_TARGETS = [7, 1, 40, 12], [3, 1, 25, 12]
DIM = 8


def make_batch(features: Sequence[int] = ()) -> RankBatch:
    """Rows in which negatives share the order of their positive and are not visible, as prepared sequences have them."""
    generator = torch.Generator().manual_seed(0)
    order, visible, time = [], [], []
    for length in LENGTHS:
        negative = torch.rand(length, generator=generator) < 0.4
        negative[0] = False
        order.append((~negative).cumsum(0) - 1 + 3)
        visible.append(~negative & (torch.rand(length, generator=generator) < 0.9))
        time.append(order[-1] * 1000 + 5)
    N = sum(LENGTHS)
    empty = KeyedJaggedTensor(keys=[], values=torch.zeros(0), lengths=torch.zeros(0, dtype=torch.int64))
    return RankBatch(
        items=empty,
        users=empty,
        user_B=torch.arange(len(LENGTHS)),
        lengths_B=torch.tensor(LENGTHS),
        num_targets_B=torch.tensor(NUM_TARGETS),
        weight_B=torch.ones(len(LENGTHS)),
        action_N=torch.randint(2, (N,), generator=generator),
        weight_N=torch.ones(N),
        values_NR=torch.zeros(N, 0),
        features_NF=make_codes(features, N),
        timestamp_N=torch.cat(time),
        order_N=torch.cat(order),
        visible_N=torch.cat(visible),
        item_N=torch.arange(N, dtype=torch.int32),
        global_targets=torch.tensor(float(sum(NUM_TARGETS))),
        global_labels_K=torch.tensor([float(sum(NUM_TARGETS))]),
    )


def without_items(batch: RankBatch) -> RankBatch:
    """With some events whose items are missing; no target is one, nor every event that a target may read."""
    item_N = batch.item_N.clone()
    item_N[[0, 2, 9, 10, 12, 13, 16, 20]] = -1
    assert (item_N[Targets.of(batch).event_S] >= 0).all()
    return replace(batch, item_N=item_N)


def make_codes(sizes: Sequence[int], N: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    columns = [torch.randint(size, (N,), generator=generator) for size in sizes]
    return torch.stack(columns, dim=1) if columns else torch.zeros(N, 0, dtype=torch.int64)


def make_events() -> SIDEConfig:
    generator = torch.Generator().manual_seed(1)
    spec = SIDSpec(parse_stages("onehot:6,ternary*12"), "test")
    codec = Codec(spec, torch.zeros(DIM), tuple(torch.randn(r, DIM, generator=generator) for r in spec.radices))
    return SIDEConfig(name="item", feature_names=["sid"], codec=codec)


def make_code_reader(learned_queries: int) -> tuple[CodeReader, torch.Tensor]:
    """With random weights, and the batch's packed SIDs."""
    events, generator = make_events(), torch.Generator().manual_seed(2)
    spec = events.codec.spec
    words_NW = spec.pack(torch.stack([torch.randint(r, (sum(LENGTHS),), generator=generator) for r in spec.radices], 1))
    torch.manual_seed(2)
    config = RankerConfig(dim=DIM, num_heads=2, dropout=0.0, learned_queries=learned_queries)
    reader = CodeReader(config, events.embedding_dim, events, 2, torch.device("cpu"))
    with torch.no_grad():
        for parameter in (reader.attention.bias_UH, reader.attention.bucket_value_AD):
            parameter.normal_()
    return reader, words_NW


def by_definition(batch):
    """(row, event, events it may read) of each target."""
    first = 0
    for row, (length, count) in enumerate(zip(LENGTHS, NUM_TARGETS, strict=True)):
        for event in range(first + length - count, first + length):
            reads = [
                t
                for t in range(first, first + length)
                if batch.visible_N[t] and batch.order_N[t] < batch.order_N[event]
            ]
            yield row, event, reads
        first += length


def test_targets_read_what_the_definition_says():
    batch = make_batch()
    targets = Targets.of(batch)
    expected = list(by_definition(batch))
    assert targets.row_S.tolist() == [row for row, _, _ in expected]
    assert targets.event_S.tolist() == [event for _, event, _ in expected]
    reads = [
        targets.visible_V[b:e].tolist() for b, e in zip(targets.begin_S.tolist(), targets.end_S.tolist(), strict=True)
    ]
    assert reads == [reads for *_, reads in expected]
    assert any(not r for r in reads) and any(len(r) > 10 for r in reads)


def test_context_of_a_target():
    batch = make_batch()
    context = Context.of(batch, Targets.of(batch), num_tasks=1)
    for s, (_, event, reads) in enumerate(by_definition(batch)):
        positives = int(batch.action_N[reads].sum())
        assert float(context.log_odds_SK[s, 0].exp()) == pytest.approx((positives + 1) / (len(reads) - positives + 1))
        gap = min((int(batch.timestamp_N[event] - batch.timestamp_N[t]) for t in reads), default=None)
        assert context.gap_S[s] == (GAP_BUCKETS - 1 if gap is None else gap_bucket(torch.tensor(gap)))
        assert context.count_S[s] == gap_bucket(batch.order_N[event])


def test_a_target_in_code_space_depends_on_exactly_what_it_reads():
    batch, (reader, words_NW) = make_batch(), make_code_reader(0)
    spec = make_events().codec.spec
    targets = Targets.of(batch)
    with torch.no_grad():
        q_SD, pooled_S1D = reader(batch, words_NW, targets)
        torch.testing.assert_close(q_SD, reader.item_vectors(words_NW, torch.arange(len(words_NW)))[targets.event_S])
        expected = list(by_definition(batch))
        for event in range(0, sum(LENGTHS), 3):
            changed_NW = words_NW.clone()
            changed_NW[event] = (changed_NW[event] + 12345) % spec.word_limits[0]
            _, changed_S1D = reader(batch, changed_NW, targets)
            differs = ((changed_S1D - pooled_S1D).abs() > 1e-6).flatten(1).any(1)
            for s, (_, own, reads) in enumerate(expected):
                assert bool(differs[s]) == (event in reads or event == own and bool(reads)), (event, s)


def test_events_without_an_item_are_no_targets():
    """The others are what they were, and read what they read."""
    batch = make_batch()
    every = Targets.of(batch)
    item_N = batch.item_N.clone()
    item_N[every.event_S[[1, 4]]] = -1
    kept = torch.ones(len(every.event_S), dtype=torch.bool)
    kept[[1, 4]] = False
    fewer = Targets.of(replace(batch, item_N=item_N))
    assert fewer.visible_V.equal(every.visible_V)
    for name in ("event_S", "row_S", "begin_S", "end_S"):
        assert getattr(fewer, name).equal(getattr(every, name)[kept])
