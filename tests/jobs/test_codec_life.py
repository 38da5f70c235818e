"""The commands on SIDs in use: drift, collisions, and a digit that tells apart what shares one."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from sidrec_torchrec.cli import main
from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.data.sid_manifest import Generation, generation_file
from sidrec_torchrec.data.sids import published, read_sids, write_sids
from sidrec_torchrec.errors import CodecMismatchError, DataError, RunMismatchError
from sidrec_torchrec.fusion.model import ItemTensors
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import codec_collisions, codec_disambiguate, codec_drift, encode_corpus
from sidrec_torchrec.jobs.codec_collisions import CodecCollisionsConfig
from sidrec_torchrec.jobs.codec_disambiguate import CodecDisambiguateConfig
from sidrec_torchrec.jobs.codec_drift import CodecDriftConfig
from sidrec_torchrec.side.collection import SIDECollection
from sidrec_torchrec.side.expansion import SIDEConfig


def write(folder: Path, item_ids, digits, stages: str = "ternary*4", fingerprint: str = "f" * 16) -> Path:
    """A folder as encode-corpus writes it: SIDs, and a codec of random tables."""
    spec = SIDSpec(parse_stages(stages), fingerprint)
    write_sids(folder / "sids.parquet", spec, [(np.array(item_ids), spec.pack(np.array(digits)))])
    generator = torch.Generator().manual_seed(0)
    tables = tuple(torch.randn(radix, 3, generator=generator) for radix in spec.radices)
    Codec(spec, torch.randn(3, generator=generator), tables).save(folder / "codec")
    return folder


# ---- drift


def test_drift_between_two_corpora_of_one_codec(corpus, sids, tmp_path, capsys):
    """The second corpus lacks some items, has some new ones, and the content of one is another's now."""
    table = pq.read_table(corpus / "items.parquet")
    ids = table["item_id"].to_numpy().copy()
    ids[:20] += 1_000_000
    ids[[50, 51]] = ids[[51, 50]]
    second = tmp_path / "second"
    second.mkdir()
    place = table.schema.get_field_index("item_id")
    pq.write_table(table.set_column(place, "item_id", pa.array(ids))[:100], second / "items.parquet")
    tokenizer = sids["side"].parent / "tokenizers" / "side"
    encode_corpus.main(
        encode_corpus.EncodeCorpusConfig(data=second, tokenizer=tokenizer, out=tmp_path / "second_sids", report="full")
    )

    flags = ["--old", str(sids["side"]), "--new", str(tmp_path / "second_sids"), "--json", str(tmp_path / "drift.json")]
    assert main(["codec", "drift", *flags]) == 0
    printed, report = capsys.readouterr().out, json.loads((tmp_path / "drift.json").read_text())
    assert "Prefixes of the 80 items in both" in printed and "text_emb" in printed
    assert report["old"]["fingerprint"] == report["new"]["fingerprint"]
    assert (report["old"]["items"], report["new"]["items"], report["common_items"]) == (120, 100, 80)

    spec = Codec.load(sids["side"] / "codec").spec
    old_NL, new_NL = (
        spec.unpack(read_sids(f, Codec.load(f / "codec"))[1]) for f in (sids["side"], tmp_path / "second_sids")
    )
    swapped = old_NL[[50, 51]]
    assert (swapped[0] != swapped[1]).any()
    first = int((swapped[0] != swapped[1]).argmax()) + 1
    assert [p["changed"] for p in report["prefixes"]] == [0.0] * (first - 1) + [2 / 80] * (10 - first + 1)
    for j, digit in enumerate(report["digits"]):
        shares = [np.bincount(digits_NL[:, j], minlength=3) / len(digits_NL) for digits_NL in (old_NL, new_NL)]
        middle = sum(shares) / 2
        expected = sum(float(p * math.log2(p / m)) / 2 for s in shares for p, m in zip(s, middle, strict=True) if p)
        assert digit["divergence"] == pytest.approx(expected, abs=1e-9)
    for folder, age in ((sids["side"], "old"), (tmp_path / "second_sids", "new")):
        metrics = json.loads((folder / "metrics.json").read_text())
        for source, errors in metrics["reconstruction"].items():
            assert report["reconstruction"][source][age] == errors[-1]


def test_drift_between_two_codecs(sids, capsys):
    report = codec_drift.main(CodecDriftConfig(old=sids["side"], new=sids["text"] / "sids.parquet"))
    assert (report["common_items"], report["digits"]) == (120, None)
    assert [p["changed"] for p in report["prefixes"]] == [None] * 10  # trits against codewords
    assert all(-1 <= p["agreement"] <= 1 for p in report["prefixes"] if p["agreement"] is not None)
    assert report["reconstruction"].keys() == {"text_emb"}  # what both encode
    assert "onehot:8*2" in capsys.readouterr().out


def test_drift_joins_items_by_id(tmp_path, capsys):
    old = write(tmp_path / "old", [1, 2, 3, 4], [[0, 0, 0, 0], [0, 0, 1, 1], [2, 2, 2, 2], [1, 1, 1, 1]])
    new = write(tmp_path / "new", [9, 3, 2, 1], [[0, 0, 0, 0], [2, 2, 2, 2], [0, 0, 2, 1], [0, 0, 0, 0]])
    report = codec_drift.main(CodecDriftConfig(old=old, new=new))
    assert report["common_items"] == 3
    assert [p["changed"] for p in report["prefixes"]] == [0, 0, 1 / 3, 1 / 3]
    assert report["reconstruction"] == {}


def test_nothing_to_compare_is_an_error_unless_the_codec_is_one(tmp_path):
    old = write(tmp_path / "old", [1, 2], [[0, 0, 0, 0], [0, 0, 1, 1]])
    new = write(tmp_path / "new", [3, 4], [[0, 0, 0, 0], [0, 0, 1, 1]], fingerprint="e" * 16)
    with pytest.raises(DataError, match="old/sids.parquet and .*no item in common and were made by two codecs"):
        codec_drift.main(CodecDriftConfig(old=old, new=new))
    same = write(tmp_path / "same", [3, 4], [[0, 0, 0, 0], [0, 0, 1, 1]])
    report = codec_drift.main(CodecDriftConfig(old=old, new=same))
    assert (report["prefixes"], report["common_items"]) == ([], 0)
    assert [d["divergence"] for d in report["digits"]] == [0] * 4


# ---- collisions

DIGITS = [[0, 0, 0, 0], [2, 1, 0, 1], [0, 0, 0, 0], [2, 1, 0, 1], [0, 0, 0, 1], [2, 1, 0, 1], [1, 1, 1, 1]]
IDS = [10, 11, 12, 13, 14, 15, 16]


def write_items(folder: Path, ids=IDS, vectors=((1, 1), (5, 5), (1, 1), (6, 5), (1, 1), (5, 5), (9, 9))) -> Path:
    folder.mkdir()
    columns = {
        "item_id": pa.array(ids, pa.int64()),
        "emb": pa.array([list(map(float, v)) for v in vectors[: len(ids)]], pa.list_(pa.float32(), 2)),
        "title": [f"[title] {i}" for i in ids],
        "tags": [["a", "b"] if i % 2 else None for i in ids],
    }
    pq.write_table(pa.table(columns).take(list(range(len(ids)))[::-1]), folder / "items.parquet", row_group_size=2)
    return folder


def test_collisions_name_what_collides(tmp_path, capsys):
    sids = write(tmp_path / "sids", IDS, DIGITS)
    items = write_items(tmp_path / "items")
    flags = ["--sids", str(sids), "--items", str(items), "--members", "2", "--json", str(tmp_path / "c.json")]
    assert main(["codec", "collisions", *flags]) == 0
    report, printed = json.loads((tmp_path / "c.json").read_text()), capsys.readouterr().out
    assert [(p["digits"], p["distinct"], p["shared"], p["largest"]) for p in report["prefixes"]] == [
        (1, 3, 6, 3),
        (2, 3, 6, 3),
        (3, 3, 6, 3),
        (4, 4, 5, 3),
    ]
    # 10 and 12 are one item twice, and so are 11 and 15; 14 has their content too, but a SID of its own
    assert report["duplicates"] == 4
    assert report["groups"] == [
        {
            "digits": [2, 1, 0, 1],
            "size": 3,
            "members": [
                {"item_id": 11, "title": "[title] 11", "tags": ["a", "b"]},
                {"item_id": 13, "title": "[title] 13", "tags": ["a", "b"]},
            ],
        },
        {
            "digits": [0, 0, 0, 0],
            "size": 2,
            "members": [
                {"item_id": 10, "title": "[title] 10", "tags": None},
                {"item_id": 12, "title": "[title] 12", "tags": None},
            ],
        },
    ]
    assert "5 of 7 items share their SID with another; 4 of them have exactly the content" in printed
    assert "[title] 11" in printed and "3 items of SID 2 1 0 1" in printed


def test_collisions_without_items(tmp_path, capsys):
    report = codec_collisions.main(CodecCollisionsConfig(sids=write(tmp_path / "sids", IDS, DIGITS), groups=1))
    assert report["duplicates"] is None
    assert report["groups"] == [
        {"digits": [2, 1, 0, 1], "size": 3, "members": [{"item_id": 11}, {"item_id": 13}, {"item_id": 15}]}
    ]
    assert "5 of 7 items share their SID with another\n" in capsys.readouterr().out


def test_one_column_is_chosen_and_none_other_shown(tmp_path):
    sids, items = write(tmp_path / "sids", IDS, DIGITS), write_items(tmp_path / "items")
    report = codec_collisions.main(CodecCollisionsConfig(sids=sids, items=items, column=("tags",)))
    assert report["groups"][0]["members"][0] == {"item_id": 11, "tags": ["a", "b"]}
    with pytest.raises(DataError, match="no target 'name'|'name'"):
        codec_collisions.main(CodecCollisionsConfig(sids=sids, items=items, column=("name",)))
    with pytest.raises(ValueError, match="give items too"):
        CodecCollisionsConfig(sids=sids, column=("tags",))


def test_items_that_were_not_encoded_are_refused(tmp_path):
    sids, items = write(tmp_path / "sids", IDS, DIGITS), write_items(tmp_path / "items", IDS[:5])
    with pytest.raises(
        DataError, match=r"items.parquet: no item_id 15, which has a SID in .*sids.parquet; give the items"
    ):
        codec_collisions.main(CodecCollisionsConfig(sids=sids, items=items))


def test_collisions_of_a_real_corpus_are_those_encode_corpus_counted(corpus, sids):
    report = codec_collisions.main(CodecCollisionsConfig(sids=sids["text"], items=corpus))
    counted = json.loads((sids["text"] / "metrics.json").read_text())["collisions"]
    assert {"items": report["prefixes"][-1]["shared"], "largest": report["prefixes"][-1]["largest"]} == counted
    assert counted["items"] > 0
    titles = {row["item_id"]: row for row in pq.read_table(open_items(corpus).path).to_pylist()}
    for group in report["groups"]:
        for member in group["members"]:
            assert member.items() <= titles[member["item_id"]].items()


# ---- a SID of one's own


def test_every_item_gets_a_sid_of_its_own_and_decodes_as_before(tmp_path, capsys):
    sids = write(tmp_path / "sids", IDS, DIGITS)
    assert main(["codec", "disambiguate", "--sids", str(sids), "--out", str(tmp_path / "own"), "--radix", "3"]) == 0
    assert "7 items, each with a SID of its own; the most that shared one: 3" in capsys.readouterr().out
    codec, own = Codec.load(sids / "codec"), Codec.load(tmp_path / "own" / "codec")
    ids, words_NW = read_sids(tmp_path / "own", own)
    assert ids.tolist() == IDS
    assert own.spec.unpack(words_NW).tolist() == [
        [*digits, DIGITS[:n].count(digits)] for n, digits in enumerate(DIGITS)
    ]
    assert len(np.unique(words_NW, axis=0)) == len(IDS)
    plain = torch.from_numpy(read_sids(sids, codec)[1])
    for depth in (None, 5, 4, 2):
        before_ND = codec.decode(plain, num_digits=depth and min(depth, 4))
        assert torch.equal(own.decode(torch.from_numpy(words_NW), num_digits=depth), before_ND)
    with pytest.raises(CodecMismatchError):
        read_sids(tmp_path / "own", codec)
    report = codec_collisions.main(CodecCollisionsConfig(sids=tmp_path / "own"))
    assert (report["prefixes"][-1]["shared"], report["groups"]) == (0, [])


def test_side_decodes_the_added_digit_to_nothing(tmp_path):
    sids = write(tmp_path / "sids", IDS, DIGITS)
    codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=tmp_path / "own"))
    vectors = []
    for folder in (sids, tmp_path / "own"):
        codec = Codec.load(folder / "codec")
        words_NW = torch.from_numpy(read_sids(folder, codec)[1])
        features = KeyedJaggedTensor(keys=["sid"], values=words_NW[:, 0], lengths=torch.tensor([3, 4]))
        side = SIDECollection([SIDEConfig(name="side", feature_names=["sid"], codec=codec, mode="decoded")])
        vectors.append(side(features)["sid"].values())
    torch.testing.assert_close(*vectors, rtol=0, atol=1e-6)  # other chunks, other order of addition


@pytest.mark.parametrize("block", [2, 1 << 16])
def test_items_to_come_change_no_digit_of_those_before(block, tmp_path, monkeypatch):
    monkeypatch.setattr(codec_disambiguate, "_BLOCK", block)
    rng = np.random.default_rng(0)
    digits_NL = rng.integers(0, 3, (200, 39)) * (np.arange(39) < 4)  # the added digit needs a second word
    written = []
    for n in (120, 200):
        sids = write(tmp_path / f"sids{n}", np.arange(n), digits_NL[:n], "ternary*39")
        codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=tmp_path / f"own{n}", radix=64))
        codec = Codec.load(tmp_path / f"own{n}" / "codec")
        written.append((codec.spec, read_sids(tmp_path / f"own{n}", codec)[1]))
    (old_spec, old_NW), (new_spec, new_NW) = written
    assert old_spec == new_spec and old_spec.num_words == 2
    np.testing.assert_array_equal(new_NW[:120], old_NW)
    assert len(np.unique(new_NW, axis=0)) == 200


def test_each_radix_is_a_codec_of_its_own(tmp_path):
    codec = Codec.load(write(tmp_path / "sids", IDS, DIGITS) / "codec")
    fingerprints = {codec.spec.fingerprint, *(codec.with_serial_digit(r).spec.fingerprint for r in (3, 4))}
    assert len(fingerprints) == 3
    assert codec.with_serial_digit(3).spec == codec.with_serial_digit(3).spec


def test_more_items_of_one_sid_than_the_digit_has_values_are_refused(tmp_path):
    sids = write(tmp_path / "sids", IDS, DIGITS)
    with pytest.raises(
        DataError, match=r"3 items share a SID \(item_id 11, 13, 15, ...\), but a digit of radix 2 tells 2"
    ):
        codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=tmp_path / "own", radix=2))
    assert not (tmp_path / "own").exists()


def test_what_else_cannot_be_disambiguated_is_refused(tmp_path):
    sids = write(tmp_path / "sids", IDS, DIGITS)
    with pytest.raises(ValueError, match="2 to 32768 values, got 1"):
        CodecDisambiguateConfig(sids=sids, out=tmp_path / "own", radix=1)
    with pytest.raises(RunMismatchError, match="holds files of something else"):
        codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=sids))
    other = write(tmp_path / "other", IDS, DIGITS, fingerprint="e" * 16)
    (sids / "codec" / "codec.json").write_bytes((other / "codec" / "codec.json").read_bytes())
    with pytest.raises(CodecMismatchError, match="sids.parquet: made with codec ffffffff"):
        codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=tmp_path / "own"))


# ---- within a capacity


def grow(folder: Path, item_ids, digits, stages: str = "ternary*4", fingerprint: str = "f" * 16) -> None:
    """One generation more, as encode-corpus --append writes it."""
    spec, manifest = SIDSpec(parse_stages(stages), fingerprint), published(folder)
    path = folder / generation_file(len(manifest.generations))
    write_sids(path, spec, [(np.array(item_ids), spec.pack(np.array(digits)))])
    manifest.followed_by(Generation.of(path)).write(folder)


@pytest.mark.parametrize("flags", [["--radix", "9"], ["--capacity", "1"], ["--capacity", "2"]])
def test_generations_are_added_and_published_ones_stay(flags, tmp_path, capsys):
    """In steps or at once, the same SIDs; with room for each item, or for two."""
    sids = write(tmp_path / "sids", IDS, DIGITS)
    command = ["codec", "disambiguate", "--sids", str(sids), *flags]
    assert main([*command, "--out", str(tmp_path / "own")]) == 0
    first = dict(zip(*map(list, read_lists(tmp_path / "own")), strict=True))
    before = (tmp_path / "own" / "sids.parquet").read_bytes()
    grow(sids, [3, 20, 1], [[0, 0, 0, 0], [2, 1, 0, 1], [0, 0, 0, 0]])
    assert main([*command, "--out", str(tmp_path / "own")]) == 2
    assert "add the generations it does not have with --append" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "own"), "--append"]) == 0
    assert (tmp_path / "own" / "sids.parquet").read_bytes() == before
    both = read_lists(tmp_path / "own")
    assert both[0] == [*IDS, 3, 20, 1]
    assert dict(zip(*both, strict=True)).items() >= first.items()
    _, counts = np.unique(both[1], axis=0, return_counts=True)
    assert counts.max() <= int(flags[1] if flags[0] == "--capacity" else 1)
    assert main([*command, "--out", str(tmp_path / "once")]) == 0
    assert read_lists(tmp_path / "once") == both
    assert main([*command, "--out", str(tmp_path / "own"), "--append"]) == 0
    assert "nothing new: it has all 2 generations" in capsys.readouterr().err
    codec = Codec.load(tmp_path / "own")
    assert (codec.spec.fingerprint == "f" * 16) == (flags[0] == "--capacity")
    # SIDs encoded anew under the same name are other SIDs
    write(sids, IDS, DIGITS[::-1])
    (sids / "manifest.json").unlink()
    (sids / "sids-00001.parquet").unlink()
    assert main([*command, "--out", str(tmp_path / "own"), "--append"]) == 2
    assert "was made of other SIDs than" in capsys.readouterr().err


def read_lists(folder: Path) -> tuple[list, list]:
    item_ids, words_NW = read_sids(folder, Codec.load(folder))
    return item_ids.to_pylist(), list(map(tuple, words_NW.tolist()))


def test_the_items_of_least_id_keep_their_sid(tmp_path):
    """Whatever their order in the file; text by its bytes."""
    sids = write(tmp_path / "sids", [12, 10, 11], [[0, 0, 0, 0]] * 3)
    result = codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=tmp_path / "own", capacity=1))
    item_ids, words = read_lists(tmp_path / "own")
    assert item_ids == [12, 10, 11]
    codec = Codec.load(sids)
    every = np.arange(81)[:, None]
    vectors_ND = codec.decode(torch.from_numpy(every)).double().numpy()
    order = np.argsort(np.square(vectors_ND - vectors_ND[0]).sum(1), kind="stable")
    assert [words[1], words[2], words[0]] == [(int(sid),) for sid in order[:3]]
    assert (result["items"], result["moved"], result["error_before"]) == (3, 2, pytest.approx(0, abs=1e-9))
    distance = np.square(vectors_ND[order[1:3]] - vectors_ND[0]).sum()
    scale = 2 * np.square(vectors_ND[0] - codec.offset_D.double().numpy()).sum()
    assert result["error_after"] == pytest.approx(distance / scale)


def test_moved_items_go_near_their_own_vectors(corpus, sids, tmp_path, capsys):
    """With items and tokenizer at hand; a real corpus, in which most items share a SID of two digits."""
    tokenizer = Tokenizer.load(sids["text"].parent / "tokenizers" / "text")
    flags = {"sids": sids["text"], "capacity": 3}
    blind = codec_disambiguate.main(CodecDisambiguateConfig(**flags, out=tmp_path / "blind"))
    content = {"items": corpus, "tokenizer": sids["text"].parent / "tokenizers" / "text"}
    result = codec_disambiguate.main(CodecDisambiguateConfig(**flags, **content, out=tmp_path / "near"))
    assert result["moved"] == blind["moved"] > 10
    _, counts = np.unique(read_lists(tmp_path / "near")[1], axis=0, return_counts=True)
    assert counts.max() == 3
    (batch,) = open_items(corpus, sources=["text_emb"]).batches(targets=())
    items = ItemTensors({"text_emb": torch.from_numpy(batch.sources["text_emb"])}, {"text_emb": torch.from_numpy(batch.present["text_emb"])})  # fmt: skip
    latents_ND = tokenizer.latents(items)
    squared = {}
    for name, folder in {"own": sids["text"], "near": tmp_path / "near", "blind": tmp_path / "blind"}.items():
        words = torch.tensor(read_lists(folder)[1])
        decoded = tokenizer.codec.decode(words).double()
        squared[name] = (decoded - latents_ND).square().sum(1)
        rest_ND = tokenizer.model.decoders["text_emb"](decoded.float()) - tokenizer.model.standardized(
            items, "text_emb"
        )
        squared[name + " source"] = rest_ND.detach().square().sum(1)
    moved = torch.tensor(
        [a != b for a, b in zip(read_lists(sids["text"])[1], read_lists(tmp_path / "near")[1], strict=True)]
    )
    scale = (latents_ND - tokenizer.codec.offset_D.double()).square().sum(1)[moved].sum()
    assert result["error_before"] == pytest.approx(float(squared["own"][moved].sum() / scale), rel=1e-5)
    assert result["error_after"] == pytest.approx(float(squared["near"][moved].sum() / scale), rel=1e-5)
    assert squared["near"][moved].sum() < squared["blind"][moved].sum()
    errors = result["moved_sources"]["text_emb"]
    has = moved & items.present["text_emb"]
    ratio = float(squared["near source"][has].sum() / squared["own source"][has].sum())
    codec_drift.main(codec_drift.CodecDriftConfig(old=sids["text"], new=tmp_path / "near"))  # of unlike reports
    assert errors["after"] / errors["before"] == pytest.approx(ratio, rel=1e-4)


def test_what_cannot_be_moved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="give both, or neither"):
        CodecDisambiguateConfig(sids=tmp_path, out=tmp_path / "own", capacity=1, items=tmp_path)
    with pytest.raises(ValueError, match="give a capacity too"):
        CodecDisambiguateConfig(sids=tmp_path, out=tmp_path / "own", items=tmp_path, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="capacity must be at least 0"):
        CodecDisambiguateConfig(sids=tmp_path, out=tmp_path / "own", capacity=-1)
    sids = write(tmp_path / "sids", np.arange(10), [[0, 0]] * 10, "signs*2")
    with pytest.raises(DataError, match="10 items, but 4 SIDs with room for 2 each; raise the capacity"):
        codec_disambiguate.main(CodecDisambiguateConfig(sids=sids, out=tmp_path / "own", capacity=2))
    assert not (tmp_path / "own").exists()
