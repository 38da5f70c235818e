"""Files of the first format, kept as they were written: they are read, and the same vectors get the same SIDs, ever since.

Words in ``golden/packing.json`` come from Python's unbounded integers, decoded vectors from the sum in docs/sid_format.md,
and greedy codes were checked against the definition. A difference here is a change of the format: SIDs that others have
stored would mean something else. Add cases; do not rewrite any.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sidrec_torchrec.codec.alphabet import format_stages, parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.residual_vq import ResidualVQ, ResidualVQConfig
from sidrec_torchrec.data.sids import read_sids

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str):
    return json.loads((GOLDEN / name).read_text())


@pytest.mark.parametrize("case", golden("packing.json"), ids=lambda case: case["stages"])
@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_packing(case, kind):
    spec = SIDSpec(parse_stages(case["stages"]), "f")
    assert format_stages(spec.stages) == case["stages"]
    digits, words = zip(*case["digits_words"], strict=True)
    assert spec.pack(kind(digits)).tolist() == list(words)
    assert spec.unpack(kind(words)).tolist() == list(digits)


@pytest.mark.parametrize(
    "case", golden("encoding.json")["cases"], ids=lambda c: f"{c['kind']} {c['stages']} beam {c['beam']}"
)
def test_encoding(case):
    x_ND = torch.tensor(golden("encoding.json")["vectors"])
    stages = parse_stages(case["stages"])
    if case["kind"] == "dpca":
        quantizer = DPCA(DPCAConfig(dim=6, stages=stages, beam=case["beam"]))
    else:
        quantizer = ResidualVQ(ResidualVQConfig(dim=6, codebook_size=stages[0].radix, num_stages=len(stages)))
    quantizer.load_state_dict({name: torch.tensor(value) for name, value in case["state"].items()})
    for rows in (1, 5, len(x_ND)):
        digits_NL = torch.cat([quantizer.encode(x) for x in x_ND.split(rows)])
        assert SIDSpec(stages, "f").pack(digits_NL).tolist() == case["words"]


def test_sid_file_and_codec():
    codec = Codec.load(GOLDEN / "sids" / "codec")
    assert format_stages(codec.spec.stages) == "onehot:8,ternary*42"
    item_ids_N, words_NW = read_sids(GOLDEN / "sids", codec)
    assert item_ids_N.tolist() == list(range(7, 247, 10))
    assert words_NW.tolist() == golden("encoding.json")["cases"][0]["words"]
    for depth, expected_ND in golden("decoded.json").items():
        decoded_ND = codec.decode(torch.from_numpy(words_NW), num_digits=int(depth))
        torch.testing.assert_close(decoded_ND, torch.tensor(expected_ND), rtol=0, atol=2e-5)


def test_codec_is_written_as_it_was(tmp_path):
    Codec.load(GOLDEN / "sids" / "codec").save(tmp_path / "codec")
    assert (tmp_path / "codec" / "codec.json").read_bytes() == (GOLDEN / "sids" / "codec" / "codec.json").read_bytes()
    written, kept = (torch.load(folder / "codec.pt") for folder in (tmp_path / "codec", GOLDEN / "sids" / "codec"))
    assert written.keys() == kept.keys()
    assert all(torch.equal(written[name], kept[name]) for name in kept)
