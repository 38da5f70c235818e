"""``sids.parquet``: what is written is read back, by the codec that made it and no other."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.sids import open_sids, read_sids, write_sids
from sidrec_torchrec.errors import CodecMismatchError, DataError


def make_codec(stages: str = "onehot:5,ternary*3", fingerprint: str = "0123456789abcdef") -> Codec:
    spec = SIDSpec(parse_stages(stages), fingerprint)
    return Codec(spec, torch.zeros(2), tuple(torch.zeros(radix, 2) for radix in spec.radices))


def make_sids(codec: Codec, n: int = 10) -> tuple[np.ndarray, np.ndarray]:
    digits_NL = np.random.default_rng(0).integers(0, codec.spec.radices, (n, codec.spec.num_digits))
    return np.arange(n) * 7 - 3, codec.spec.pack(torch.from_numpy(digits_NL)).numpy()


@pytest.mark.parametrize("stages", ["onehot:5,ternary*3", "ternary*90"])
@pytest.mark.parametrize("cut", [0, 4, 10])
def test_round_trip(stages, cut, tmp_path):
    """One word and three, in one batch or two, from the file or its folder."""
    codec = make_codec(stages)
    ids_N, words_NW = make_sids(codec)
    batches = [(ids_N[:cut], words_NW[:cut]), (ids_N[cut:], words_NW[cut:])]
    write_sids(tmp_path / "sids.parquet", codec.spec, iter(batches))
    for path in (tmp_path, tmp_path / "sids.parquet"):
        read_ids_N, read_NW = read_sids(path, codec)
        assert (read_ids_N.type, read_NW.dtype) == (pa.int64(), np.int64)
        np.testing.assert_array_equal(read_ids_N, ids_N)
        np.testing.assert_array_equal(read_NW, words_NW)


def test_file_says_what_it_holds(tmp_path):
    """Columns and metadata as docs/sid_format.md lists them."""
    for stages, words in (("onehot:5,ternary*3", ["sid"]), ("ternary*90", ["sid_0", "sid_1", "sid_2"])):
        codec = make_codec(stages)
        write_sids(tmp_path / "sids.parquet", codec.spec, [make_sids(codec)])
        schema = pq.read_schema(tmp_path / "sids.parquet")
        assert schema.names == ["item_id", *words]
        assert set(schema.types) == {pa.int64()}
        metadata = {b"sidrec.stages": stages.encode(), b"sidrec.fingerprint": b"0123456789abcdef"}
        assert metadata.items() <= schema.metadata.items()


def test_another_codec_is_refused(tmp_path):
    codec = make_codec()
    write_sids(tmp_path / "sids.parquet", codec.spec, [make_sids(codec)])
    with pytest.raises(CodecMismatchError, match="sids.parquet: made with codec 0123456789abcdef, but .* fedcba98"):
        read_sids(tmp_path, make_codec(fingerprint="fedcba9876543210"))


def test_what_is_no_sid_file_is_named(tmp_path):
    codec, path = make_codec(), tmp_path / "sids.parquet"
    with pytest.raises(DataError, match="sids.parquet: not found; run encode-corpus"):
        read_sids(tmp_path, codec)
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="sids.parquet: not a Parquet file"):
        read_sids(tmp_path, codec)
    pq.write_table(pa.table({"item_id": [1], "sid": [2]}), path)
    with pytest.raises(DataError, match="sids.parquet: does not say which codec"):
        read_sids(tmp_path, codec)
    write_sids(path, codec.spec, [make_sids(codec)])
    table = pq.read_table(path)
    pq.write_table(table.drop_columns(["sid"]), path)
    with pytest.raises(DataError, match="sids.parquet: no column 'sid'"):
        read_sids(tmp_path, codec)
    pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"sidrec.stages": b"quinary*9"}), path)
    with pytest.raises(DataError, match="sids.parquet: stages 'quinary.*a newer version of sidrec_torchrec may"):
        open_sids(tmp_path)


@pytest.mark.parametrize(
    ("ids", "words", "message"),
    [
        ([4, 5, 4], [0, 1, 2], "column 'item_id', row 2: item_id 4 is already in row 0"),
        ([4, None, 6], [0, 1, 2], "column 'item_id', row 1: null"),
        ([4, 5, 6], [0, None, 2], "column 'sid', row 1: null"),
        ([4, 5, 6], [0, 1, 135], r"from row 0 on, row 2, word 0 is 135, no packed SID of onehot:5,ternary\*3"),
    ],
)
def test_rows_that_cannot_be_are_named(ids, words, message, tmp_path):
    codec = make_codec()
    write_sids(tmp_path / "sids.parquet", codec.spec, [])
    schema = pq.read_schema(tmp_path / "sids.parquet")
    pq.write_table(pa.table({"item_id": ids, "sid": words}, schema=schema), tmp_path / "sids.parquet")
    with pytest.raises(DataError, match=message):
        read_sids(tmp_path, codec)


def test_a_file_is_read_in_batches_without_its_codec(tmp_path):
    codec = make_codec("ternary*90")
    ids_N, words_NW = make_sids(codec)
    write_sids(tmp_path / "sids.parquet", codec.spec, [(ids_N, words_NW)])
    file = open_sids(tmp_path)
    assert (file.spec, file.num_items) == (codec.spec, 10)
    batches = list(file.batches(4))
    assert [len(ids) for ids, _ in batches] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in batches]), ids_N)
    np.testing.assert_array_equal(np.concatenate([words for _, words in batches]), words_NW)


def test_interrupted_writing_leaves_what_was_there(tmp_path):
    codec = make_codec()
    ids_N, words_NW = make_sids(codec)
    write_sids(tmp_path / "sids.parquet", codec.spec, [(ids_N, words_NW)])

    def broken():
        yield ids_N[:2], words_NW[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_sids(tmp_path / "sids.parquet", codec.spec, broken())
    assert [path.name for path in tmp_path.iterdir()] == ["sids.parquet"]
    np.testing.assert_array_equal(read_sids(tmp_path, codec)[0], ids_N)
