"""A trained ranker's folder as version 0.1 wrote it: longer names, and the codec as text."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from sidrec_torchrec.errors import CodecMismatchError
from sidrec_torchrec.ranker.recipe import TrainedRanker
from sidrec_torchrec.side.code_attention import CodeAttention
from sidrec_torchrec.side.collection import SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig
from tests.side.test_in_torchrec import make_codec

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def make_model(fingerprint: str = "aaaa") -> nn.Module:
    """What holds a codec in a ranker; a tokenizer's folder gives its table its name, so that any character may be in it."""
    table = SIDEConfig(name="rq-text", feature_names=["a"], codec=make_codec(fingerprint=fingerprint), learned=True)
    return nn.ModuleDict({"arm": SIDECollection([table]), "reader": CodeAttention(table, dim=8, num_heads=2)})


def test_its_weights_and_its_codec_are_read(tmp_path):
    state = {name: torch.rand_like(x) for name, x in make_model().state_dict().items() if x.is_floating_point()}
    old = dict(state)
    for path, path_then in (
        ("arm.tables.rq-text", "arm._expansions.expansions.rq-text"),
        ("reader.events", "reader.events"),
    ):
        old[f"{path_then}.rows_VE"] = old.pop(f"{path}.rows")
        old[f"{path_then}._extra_state"] = json.dumps({"stages": "ternary*9", "fingerprint": "aaaa"})
    dcp.save({"model": old}, checkpoint_id=tmp_path / "checkpoints" / "best")
    ranker, model = TrainedRanker(tmp_path, None), make_model()
    ranker.load(model)
    for name, expected in state.items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=0)
    with pytest.raises(CodecMismatchError, match="made with codec aaaa, but this is codec bbbb"):
        ranker.load(make_model("bbbb"))
