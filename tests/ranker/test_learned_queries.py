"""Learned queries: each reads what a target may read, whatever the target is, in training and in serving."""

import pytest
import torch

from sidrec_torchrec.ops.code_attention import gap_bucket
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.model import Ranker
from sidrec_torchrec.ranker.readers import VectorReader
from sidrec_torchrec.ranker.serving import ServingRanker, requests_of
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_attention import attend_by_loops
from tests.ranker.test_targets import DIM, LENGTHS, by_definition, make_batch, make_code_reader, make_events

CPU = torch.device("cpu")
LEARNED, FEATURES = 3, 5


def make_vector_reader(learned_queries: int) -> VectorReader:
    torch.manual_seed(1)
    config = RankerConfig(dim=DIM, num_heads=2, dropout=0.0, learned_queries=learned_queries)
    reader = VectorReader(config, FEATURES, None, 2, CPU)
    with torch.no_grad():
        for parameter in reader.attention.parameters():
            parameter.normal_(std=0.5)
    return reader


@torch.no_grad()
def test_over_vectors_each_query_pools_by_the_definition():
    batch, reader = make_batch(), make_vector_reader(LEARNED)
    features_NE = torch.randn(sum(LENGTHS), FEATURES)
    q_SD, pooled_SPD = reader(batch, features_NE, Targets.of(batch))
    x_ND = reader.vectors(features_NE)
    assert pooled_SPD.shape == (len(q_SD), 1 + LEARNED, DIM)
    for s, (_, event, reads) in enumerate(by_definition(batch)):
        query_PD = torch.cat([x_ND[event : event + 1], reader.queries.seeds_KD])
        gap_T = gap_bucket(batch.timestamp_N[event] - batch.timestamp_N[reads])
        expected_PD = attend_by_loops(
            reader.attention,
            query_PD[None, None],
            x_ND[reads].unsqueeze(0),
            batch.side_NC[reads].unsqueeze(0),
            gap_T[None, None],
            torch.ones(1, 1, len(reads), dtype=torch.bool),
            LEARNED,
        )[0, 0]
        torch.testing.assert_close(pooled_SPD[s], expected_PD, rtol=1e-4, atol=1e-5)


def test_over_codes_a_learned_query_pools_what_a_target_of_its_vector_would():
    """The attention itself is proved in tests/side/test_code_attention.py; here, who asks and what each reads."""
    batch, (reader, words_NW) = make_batch(), make_code_reader(LEARNED)
    q_SD, pooled_SPD = reader(batch, words_NW, Targets.of(batch))
    for s, (_, event, reads) in enumerate(by_definition(batch)):
        expected_PD = reader.attention(
            torch.cat([q_SD[s : s + 1], reader.queries.seeds_KD]).unsqueeze(0),
            words_NW[reads],
            torch.tensor([0]),
            torch.tensor([len(reads)]),
            batch.action_N[reads].unsqueeze(1),
            batch.timestamp_N[reads],
            batch.timestamp_N[event : event + 1],
            timeless=LEARNED,
        )[0]
        torch.testing.assert_close(pooled_SPD[s], expected_PD, rtol=1e-4, atol=1e-5)
    pooled_SPD.square().sum().backward()
    assert (reader.queries.seeds_KD.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("learned_queries", [0, LEARNED])
@torch.no_grad()
def test_serving_predicts_what_the_ranker_does(learned_queries):
    batch, (_, words_NW) = make_batch(), make_code_reader(0)
    config = RankerConfig(dim=DIM, num_heads=2, head_dims=(16,), attention="codes", learned_queries=learned_queries)
    events = make_events()
    ranker = Ranker(config, torch.nn.Identity(), events.embedding_dim, events, {}, CPU).eval()
    for parameter in ranker.parameters():
        parameter.normal_(std=0.3)
    _, expected = ranker.head(batch, words_NW, None)
    served_S = ServingRanker(ranker, {"sid": events.codec.spec})(**requests_of(batch, words_NW))
    torch.testing.assert_close(served_S, expected.prediction[:, 0], rtol=0, atol=1e-6)
    assert served_S.std() > 0.01
