"""VQ Fusion's quantizer by name: those there are, one of another package, and stages that each refuses."""

import pytest
import torch

from sidrec_torchrec.codec.alphabet import Ternary, parse_stages
from sidrec_torchrec.codec.dpca import DPCA
from sidrec_torchrec.codec.quantizer import QUANTIZERS
from sidrec_torchrec.codec.residual_vq import ResidualVQ
from sidrec_torchrec.errors import SidrecError
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionConfig
from sidrec_torchrec.fusion.model import VQFusion


@pytest.mark.parametrize(
    ("kind", "stages", "made"), [("dpca", "onehot:4,ternary*3", DPCA), ("rq", "onehot:8*2", ResidualVQ)]
)
def test_a_quantizer_builds_itself(kind, stages, made):
    quantizer = QuantizerConfig(kind=kind, stages=stages, commitment=0.5).build(6)
    assert type(quantizer) is made
    assert quantizer.stages == parse_stages(stages) and quantizer.dim == 6 and quantizer.config.commitment == 0.5


def test_what_a_quantizer_cannot_be_made_of():
    for stages in ("ternary*3", "onehot:4,onehot:8"):
        with pytest.raises(ValueError, match=rf"one-hot digits of one size, like 'onehot:256\*3'; got '{stages[:4]}"):
            QuantizerConfig(kind="rq", stages=stages)
    with pytest.raises(SidrecError, match="unknown quantizer 'pq'; there are dpca, rq"):
        QuantizerConfig(kind="pq")


def test_one_of_another_package(monkeypatch):
    class Trits(DPCA):
        @classmethod
        def check_stages(cls, stages):
            if set(stages) != {Ternary()}:
                raise ValueError("trits alone")

    monkeypatch.setitem(QUANTIZERS._entries, "trits", Trits)
    with pytest.raises(ValueError, match="trits alone"):
        QuantizerConfig(kind="trits", stages="onehot:4")
    config = VQFusionConfig(
        sources={"text": 5}, latent_dim=4, hidden_dim=0, quantizer=QuantizerConfig(kind="trits", stages="ternary*3")
    )
    model = VQFusion(config)
    assert type(model.quantizer) is Trits
    assert model.quantizer.encode(torch.randn(7, 4)).shape == (7, 3)
