"""Attention to codes and attention to vectors are one reader: with the same parameters they read the same."""

import pytest
import torch

from sidrec_torchrec.codec.packing import NO_SID
from sidrec_torchrec.ranker.config import RankerConfig
from sidrec_torchrec.ranker.readers import CodeReader, VectorReader
from sidrec_torchrec.ranker.targets import Targets
from tests.ranker.test_targets import DIM, make_batch, make_code_reader, make_events, without_items


@pytest.mark.parametrize("features", [{}, {"device": 3, "hour": 25}], ids=["actions", "features"])
@pytest.mark.parametrize("missing", [False, True], ids=["", "missing items"])
@pytest.mark.parametrize("learned_queries", [0, 2])
def test_the_same_parameters_give_the_same_pools_and_gradients(learned_queries, missing, features):
    batch, (_, words_NW) = make_batch(tuple(features.values())), make_code_reader(0)
    if missing:
        batch = without_items(batch)
        words_NW[~batch.has_item_N] = NO_SID
    events, cpu = make_events(), torch.device("cpu")
    config = RankerConfig(dim=DIM, num_heads=2, dropout=0.0, learned_queries=learned_queries)
    torch.manual_seed(3)
    codes = CodeReader(config, events.embedding_dim, events, 2, cpu, features)
    with torch.no_grad():
        for parameter in codes.parameters():
            parameter.normal_(std=0.5)
    vectors = VectorReader(config, events.embedding_dim, None, 2, cpu, features)
    state = {name.replace("attention.vectors.", "vectors."): value for name, value in codes.state_dict().items()}
    vectors.load_state_dict({name: value for name, value in state.items() if "fingerprint" not in name})

    results = []
    for reader, items in ((codes, words_NW), (vectors, codes.attention.events(words_NW))):
        q_SD, pooled_SPD = reader(batch, items, Targets.of(batch))
        (q_SD.square().sum() + pooled_SPD.square().sum()).backward()
        gradients = {name.replace("attention.vectors.", "vectors."): p.grad for name, p in reader.named_parameters()}
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        results.append((q_SD.detach(), pooled_SPD.detach(), gradients))
    (q_of_codes, of_codes, gradients), (q_of_vectors, of_vectors, expected) = results
    torch.testing.assert_close(q_of_codes, q_of_vectors, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_codes, of_vectors, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale, msg=name)
