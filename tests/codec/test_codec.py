"""The codec: decodes as its quantizer does, survives a disk, and refuses what is not its own."""

import json

import pytest
import torch

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec, fingerprint_of
from sidrec_torchrec.codec.dpca import DPCA, DPCAConfig
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.codec.residual_vq import ResidualVQ, ResidualVQConfig
from sidrec_torchrec.errors import CodecMismatchError, DataError
from tests.codec.reference import vectors

STAGES = "onehot:8,ternary*42"  # two words


def trained(kind="dpca"):
    if kind == "dpca":
        quantizer = DPCA(DPCAConfig(dim=6, stages=parse_stages(STAGES), iterations=3))
    else:
        quantizer = ResidualVQ(ResidualVQConfig(dim=6, codebook_size=8, num_stages=3))
    quantizer.initialize(vectors(200, 6))
    return quantizer


@pytest.fixture
def codec():
    return Codec.of(trained(), "0123456789abcdef")


@pytest.fixture
def saved(codec, tmp_path):
    codec.save(tmp_path / "codec")
    return tmp_path / "codec"


@pytest.mark.parametrize("kind", ["dpca", "residual_vq"])
def test_decodes_as_the_quantizer_at_every_depth(kind):
    quantizer = trained(kind)
    codec = Codec.of(quantizer, "f")
    digits_NL = quantizer.encode(vectors(50, 6, seed=1))
    words_NW = codec.spec.pack(digits_NL)
    for depth in (None, *range(codec.spec.num_digits + 1)):
        expected_ND = quantizer.decode(digits_NL, num_digits=depth).detach()
        torch.testing.assert_close(codec.decode(words_NW, num_digits=depth), expected_ND)


def test_later_training_does_not_change_a_codec():
    quantizer = trained()
    codec = Codec.of(quantizer, "f")
    before = codec.digit_tables[0].clone()
    with torch.no_grad():
        quantizer.basis_RD.add_(1)
    assert torch.equal(codec.digit_tables[0], before)


def test_no_rows(codec):
    assert codec.decode(torch.zeros(0, 2, dtype=torch.int64)).shape == (0, 6)


def test_value_tables_sum_to_the_digits_as_a_plain_vector():
    codec = Codec.of(DPCA(DPCAConfig(dim=2, stages=parse_stages("onehot:3,ternary*2"))), "f")
    tables = codec.value_tables()
    total = tables[0][1] + tables[1][0] + tables[2][2]
    assert total.tolist() == [0, 1, 0, -1, 1]


def test_bad_input_is_refused(codec):
    with pytest.raises(ValueError, match="row 0, word 0 is -1"):
        codec.decode(torch.tensor([[-1, 0]]))
    for depth in (-1, 44):
        with pytest.raises(ValueError, match=f"num_digits .*{depth}"):
            codec.decode(torch.zeros(1, 2, dtype=torch.int64), num_digits=depth)


def test_tables_of_other_digits_are_refused(codec):
    with pytest.raises(ValueError, match="digit tables have shapes"):
        Codec(SIDSpec(parse_stages("ternary*43"), "f"), codec.offset_D, codec.digit_tables)


def test_load_is_bit_exact(codec, saved):
    again = Codec.load(saved)
    assert again.spec == codec.spec
    assert torch.equal(again.offset_D, codec.offset_D)
    assert all(torch.equal(a, b) for a, b in zip(again.digit_tables, codec.digit_tables, strict=True))
    words_NW = codec.spec.pack(trained().encode(vectors(50, 6, seed=1)))
    assert torch.equal(again.decode(words_NW), codec.decode(words_NW))


def test_save_replaces_an_older_codec(saved):
    newer = Codec.of(trained("residual_vq"), "f" * 16)
    newer.save(saved)
    assert Codec.load(saved).spec == newer.spec


@pytest.mark.parametrize("name", ["codec.json", "codec.pt"])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(DataError, match=f"{name}: not found; name a folder that holds a codec"):
        Codec.load(saved)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(DataError, match="nowhere.*not found"):
        Codec.load(tmp_path / "nowhere")


def truncate(folder):
    data = (folder / "codec.pt").read_bytes()
    (folder / "codec.pt").write_bytes(data[: len(data) // 2])


def change_a_weight(folder):
    tensors = torch.load(folder / "codec.pt")
    tensors["digit_3"][1, 2] += 1e-3
    torch.save(tensors, folder / "codec.pt")


def change_stages(folder):
    value = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(value | {"stages": "onehot:8,ternary*41"}))


def change_fingerprint(folder):
    value = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(value | {"fingerprint": "f" * 16}))


def rename_a_stage(folder):
    """Other stages of the same radices: the tables alone would not tell."""
    value = json.loads((folder / "codec.json").read_text())
    (folder / "codec.json").write_text(json.dumps(value | {"stages": "onehot:8,onehot:3,ternary*41"}))


class Foreign:
    pass


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        change_a_weight,
        change_stages,
        change_fingerprint,
        rename_a_stage,
        lambda folder: (folder / "codec.pt").write_bytes(b""),
        lambda folder: (folder / "codec.pt").write_bytes(b"not a tensor file"),
        lambda folder: torch.save({"model": Foreign()}, folder / "codec.pt"),
        lambda folder: torch.save([1, 2], folder / "codec.pt"),
        lambda folder: (folder / "codec.json").write_text("{"),
        lambda folder: (folder / "codec.json").write_text("[]"),
        lambda folder: (folder / "codec.json").write_text('{"model": "another program\'s"}'),
    ],
)
def test_broken_or_foreign_files_are_refused_in_one_line(saved, spoil):
    spoil(saved)
    with pytest.raises(DataError, match="make it again") as caught:
        Codec.load(saved)
    assert str(caught.value).startswith(f"{saved}: ") and "\n" not in str(caught.value)


def test_a_codec_of_a_newer_format_is_refused_as_such(saved):
    """Before anything else of it is read: nothing is known of what it holds."""
    (saved / "codec.json").write_text('{"format": 2, "novel": []}')
    (saved / "codec.pt").unlink()
    with pytest.raises(DataError) as caught:
        Codec.load(saved)
    assert str(caught.value).startswith(f"{saved}: a codec of format 2, but this version of sidrec_torchrec reads")
    assert "install a newer one" in str(caught.value)


def test_check_refuses_sids_of_another_codec(codec):
    codec.check("0123456789abcdef", "sids.parquet")
    with pytest.raises(CodecMismatchError) as caught:
        codec.check("fedcba9876543210", "sids.parquet")
    for part in ("sids.parquet", "fedcba9876543210", "0123456789abcdef"):
        assert part in str(caught.value)


def test_fingerprint_is_stable_and_changes_with_anything():
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
    fingerprint = fingerprint_of(tensors, "config")
    # of sha256(b"config" + b"a torch.float32 (2, 3)" + 24 bytes + b"b torch.int64 ()" + 8 bytes)
    assert fingerprint == "9062fdb3403cfcda"
    assert fingerprint == fingerprint_of(dict(reversed(tensors.items())), "config")
    assert fingerprint == fingerprint_of(tensors | {"a": tensors["a"].T.contiguous().T}, "config")
    changed = tensors["a"].clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        fingerprint_of(tensors, "confih"),
        fingerprint_of({"a": tensors["a"]}, "config"),
        fingerprint_of({"a": tensors["a"], "c": tensors["b"]}, "config"),
        fingerprint_of(tensors | {"a": changed}, "config"),
        fingerprint_of(tensors | {"a": tensors["a"].double()}, "config"),
        fingerprint_of(tensors | {"a": tensors["a"].view(3, 2)}, "config"),
    ]
    assert len({fingerprint, *others}) == 7
