"""Decoding SID files."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.sids import read_sids
from sidrec_torchrec.errors import CodecMismatchError, SidrecError
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import decode_sids
from sidrec_torchrec.jobs.decode_sids import DecodeSIDsConfig


@pytest.mark.parametrize("num_digits", [0, 3])
def test_equals_the_tokenizer(sids, tmp_path, monkeypatch, num_digits):
    monkeypatch.setattr(decode_sids, "_BLOCK", 50)
    folder = sids["side"].parent / "tokenizers" / "side"
    out = tmp_path / "decoded.parquet"
    decode_sids.main(DecodeSIDsConfig(sids=sids["side"], tokenizer=folder, out=out, num_digits=num_digits))
    tokenizer = Tokenizer.load(folder / "tokenizer")
    item_ids, words = read_sids(sids["side"], tokenizer.codec)
    expected = tokenizer.decode(torch.from_numpy(words), num_digits=num_digits or None)
    table = pq.read_table(out)
    np.testing.assert_array_equal(table["item_id"], item_ids)
    for name, value_ND in expected.sources.items():
        decoded_ND = table[name].combine_chunks().values.to_numpy().reshape(len(table), -1)
        np.testing.assert_allclose(decoded_ND, value_ND, rtol=1e-5, atol=1e-6)


def test_refusals(sids, tmp_path):
    tokenizers = sids["side"].parent / "tokenizers"
    with pytest.raises(CodecMismatchError, match=r"sids\.parquet: made with codec"):
        decode_sids.main(
            DecodeSIDsConfig(sids=sids["side"], tokenizer=tokenizers / "text", out=tmp_path / "out.parquet")
        )
    with pytest.raises(SidrecError, match="num_digits must be 0 to 10"):
        decode_sids.main(
            DecodeSIDsConfig(
                sids=sids["side"], tokenizer=tokenizers / "side", out=tmp_path / "out.parquet", num_digits=11
            )
        )
    assert not (tmp_path / "out.parquet").exists()
