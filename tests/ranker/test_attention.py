"""Target attention and padding against plain loops."""

import math
from itertools import product

import pytest
import torch

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS
from sidrec_torchrec.ranker.attention import TargetAttention
from sidrec_torchrec.ranker.padding import RowLayout


def attend_by_loops(attention: TargetAttention, q_BMPD, items_BTD, side_BTC, gaps_BMT, mask_BMT, timeless=0):
    """The definition, one query, one head and one event at a time."""
    B, M, P, D = q_BMPD.shape
    H, d, num_rows = attention.num_heads, D // attention.num_heads, len(attention.bucket_value_AD)
    sizes = list(attention.side.sizes.values())
    assert sum(sizes) == num_rows
    pooled = torch.zeros(B, M, P, D)
    for b, m, p, h in product(range(B), range(M), range(P), range(H)):
        part = slice(h * d, (h + 1) * d)
        q = attention.query(q_BMPD[b, m, p])[part]
        weights, values = [attention.sink_H[h].exp()], [torch.zeros(d)]
        for t in range(items_BTD.shape[1]):
            if mask_BMT[b, m, t]:
                score = q @ attention.key(items_BTD[b, t])[part] / math.sqrt(d)
                if p < P - timeless:
                    score = score + attention.bias_UH[num_rows + gaps_BMT[b, m, t], h]
                rows = [sum(sizes[:c]) + int(bucket) for c, bucket in enumerate(side_BTC[b, t])]
                score = score + sum(attention.bias_UH[row, h] for row in rows)
                weights.append(score.exp())
                value = attention.value(items_BTD[b, t]) + sum(attention.bucket_value_AD[row] for row in rows)
                values.append(value[part])
        pooled[b, m, p, part] = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    return attention.output(pooled)


def make_inputs(B=2, M=3, P=2, T=5, D=8, features=()):
    generator = torch.Generator().manual_seed(0)
    q, items = (torch.randn(B, *n, D, generator=generator) for n in ((M, P), (T,)))
    side = torch.stack([torch.randint(0, size, (B, T), generator=generator) for size in (2, *features)], dim=2)
    gaps = torch.randint(0, GAP_BUCKETS, (B, M, T), generator=generator)
    mask = torch.rand(B, M, T, generator=generator) < 0.6
    mask[0, 0] = False  # an empty history
    return q, items, side, gaps, mask


def make_attention(dim=8, heads=2, features=()):
    torch.manual_seed(0)
    attention = TargetAttention(dim, heads, 2, {str(f): size for f, size in enumerate(features)})
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


@pytest.mark.parametrize("features", [(), (3, 5)], ids=["actions", "features"])
@pytest.mark.parametrize("timeless", [0, 1, 2])
def test_equals_the_definition(timeless, features):
    attention, inputs = make_attention(features=features), (*make_inputs(features=features), timeless)
    torch.testing.assert_close(attention(*inputs), attend_by_loops(attention, *inputs), rtol=1e-4, atol=1e-5)


def test_empty_history_pools_zeros():
    attention, inputs = make_attention(), make_inputs()
    torch.testing.assert_close(attention(*inputs)[0, 0], attention.output.bias.expand(2, -1))


@pytest.mark.parametrize("features", [(), (3, 5)], ids=["actions", "features"])
def test_gradients_equal_those_of_the_definition(features):
    attention, inputs = make_attention(features=features), make_inputs(features=features)
    gradients = []
    for function in (attention, lambda *args: attend_by_loops(attention, *args)):
        attention.zero_grad()
        function(*inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in attention.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_masked_events_change_nothing():
    attention, (q, items, side, gaps, mask) = make_attention(), make_inputs()
    unread_BT1 = ~mask.any(dim=1).unsqueeze(-1)
    before = attention(q, items, side, gaps, mask)
    after = attention(q, items + 9 * unread_BT1, side, gaps, mask)
    torch.testing.assert_close(before, after)


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of num_heads 4"):
        TargetAttention(10, 4, 2)


def test_padding_is_right_aligned():
    layout = RowLayout.of(torch.tensor([3, 1, 4, 0]))
    block = layout.pad(torch.arange(1, 9))
    assert block.tolist() == [[0, 1, 2, 3], [0, 0, 0, 4], [5, 6, 7, 8], [0, 0, 0, 0]]
    assert layout.is_entry_BT.equal(block > 0)
    assert layout.jagged(block).tolist() == list(range(1, 9))
    assert layout.jagged(layout.pad(torch.ones(8, 2))).equal(torch.ones(8, 2))
