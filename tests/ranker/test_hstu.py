"""The HSTU block against its equations, one event and one head at a time."""

import math

import pytest
import torch
from torch.nn.functional import layer_norm, silu

from sidrec_torchrec.ops.code_attention import GAP_BUCKETS
from sidrec_torchrec.ranker.hstu import HSTUBlock

DIM, HEADS = 8, 2


def make_block() -> HSTUBlock:
    torch.manual_seed(0)
    block = HSTUBlock(DIM, HEADS)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=0.5)
    return block


def block_by_loops(block: HSTUBlock, x_TD: torch.Tensor, gaps_TT: torch.Tensor) -> torch.Tensor:
    """Equations 1 to 3 for one row without padding."""
    d = DIM // HEADS

    def normed(x_D, norm):
        return layer_norm(x_D, (DIM,), norm.weight, norm.bias)

    u, v, q, k = (
        torch.stack([silu(block.uvqk(normed(x_D, block.norm))) for x_D in x_TD])[:, part * DIM : (part + 1) * DIM]
        for part in range(4)
    )
    rows = []
    for i in range(len(x_TD)):
        pooled_D = torch.zeros(DIM)
        for h in range(HEADS):
            own = slice(h * d, (h + 1) * d)
            for j in range(i + 1):
                bias = block.position_bias.weight[int(math.log2(i - j + 1)), h]
                bias = bias + block.time_bias.weight[gaps_TT[i, j], h]
                weight = silu(q[i, own] @ k[j, own] / math.sqrt(d) + bias) / (i + 1)
                pooled_D[own] = pooled_D[own] + weight * v[j, own]
        rows.append(x_TD[i] + block.output(normed(pooled_D, block.pooled_norm) * u[i]))
    return torch.stack(rows)


def test_equals_the_equations_with_gradients():
    block, generator = make_block(), torch.Generator().manual_seed(1)
    lengths, T = [9, 4, 1], 9
    x_BTD = torch.randn(3, T, DIM, generator=generator)
    gaps_BTT = torch.randint(GAP_BUCKETS, (3, T, T), generator=generator)
    is_entry_BT = torch.arange(T) >= T - torch.tensor(lengths).unsqueeze(1)
    actual = block(x_BTD, gaps_BTT, is_entry_BT)[is_entry_BT]
    expected = torch.cat(
        [block_by_loops(block, x_BTD[b, T - n :], gaps_BTT[b, T - n :, T - n :]) for b, n in enumerate(lengths)]
    )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    gradients = []
    for output in (actual, expected):
        block.zero_grad()
        output.square().sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_heads_must_divide_dim():
    with pytest.raises(ValueError, match="dim 10 is not a multiple of num_heads 4"):
        HSTUBlock(10, 4)
