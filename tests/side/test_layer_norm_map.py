"""LayerNorm in code space: rows and a scale, against torch's own LayerNorm of decoded vectors."""

import pytest
import torch

from sidrec_torchrec.side.expansion import FrozenSIDE, SIDEConfig
from sidrec_torchrec.side.layer_norm_map import LayerNormMap
from tests.side.test_code_attention import make_codec, random_words


@pytest.mark.parametrize("dim", [5, 64])  # fewer components than digits have, and more
@pytest.mark.parametrize("mode", ["digits", "decoded"])
def test_rows_times_scale_are_the_map(mode, dim):
    codec = make_codec("onehot:40,ternary*50", dim=9)
    side = FrozenSIDE(SIDEConfig(name="item", feature_names=["a"], codec=codec, mode=mode))
    torch.manual_seed(0)
    vectors, words_NW = LayerNormMap(side.rows_VE.shape[1], dim), random_words(codec, 300)
    expected_ND = torch.nn.functional.layer_norm(vectors.linear(side(words_NW)), (dim,))
    mapped_VD = vectors.rows(side.rows_VE, side.layout)
    first_L = torch.tensor([0, *side.layout.radices[:-1]]).cumsum(0)
    sums_ND = mapped_VD[side.layout.values(words_NW) + first_L].sum(1)
    gradients = []
    for factors in (None, side.factors):
        norm_RK = vectors.norm_rows(mapped_VD, side.layout, factors)
        scale_N = vectors.scale(words_NW, norm_RK, side.layout)
        torch.testing.assert_close(sums_ND * scale_N.unsqueeze(1), expected_ND, rtol=1e-4, atol=1e-4)
        gradients.append(torch.autograd.grad(scale_N.square().sum(), list(vectors.parameters()), retain_graph=True))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_rows_of_few_trits_have_short_factors():
    codec = make_codec("ternary*25", dim=64)
    side = FrozenSIDE(SIDEConfig(name="item", feature_names=["a"], codec=codec, mode="digits"))
    factor_VK, basis_KE = side.factors
    assert factor_VK.shape[1] == 25
    torch.testing.assert_close(factor_VK @ basis_KE, side.rows_VE, rtol=0, atol=1e-5)
