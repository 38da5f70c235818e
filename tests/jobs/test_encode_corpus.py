"""Encoding a corpus: every item's SID in the order of the file, the same file from any number of processes."""

import dataclasses
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.format import open_items
from sidrec_torchrec.data.sids import open_sids, read_sids
from sidrec_torchrec.engines.base import ENGINES
from sidrec_torchrec.engines.local import LocalEngine
from sidrec_torchrec.errors import DataError, RunMismatchError
from sidrec_torchrec.fusion.config import VQFusionOptions
from sidrec_torchrec.fusion.model import ItemTensors
from sidrec_torchrec.fusion.tokenizer import Tokenizer
from sidrec_torchrec.jobs import encode_corpus, train_tokenizer
from sidrec_torchrec.jobs.encode_corpus import EncodeCorpusConfig, EncodePart

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (extra ray)")


@pytest.fixture
def config(corpus: Path, sids: dict[str, Path], tmp_path: Path) -> EncodeCorpusConfig:
    return EncodeCorpusConfig(data=corpus, tokenizer=sids["side"].parent / "tokenizers" / "side", out=tmp_path / "sids")


def encode_in_small_blocks(config: EncodeCorpusConfig) -> dict:
    encode_corpus._BLOCK, encode_corpus._PART_ITEMS = 13, 30  # this process is a test's own
    return encode_corpus.main(config)


def test_sids_are_those_of_the_tokenizer(config):
    result = encode_corpus.main(config)
    tokenizer = Tokenizer.load(config.tokenizer / "tokenizer")
    item_ids_N, words_NW = read_sids(config.out, Codec.load(config.out / "codec"))
    items = open_items(config.data)
    np.testing.assert_array_equal(item_ids_N, items.ids())
    (batch,) = items.batches(targets=())
    alone = [
        tokenizer.encode(
            ItemTensors(
                {name: torch.from_numpy(x_ND[i : i + 1]) for name, x_ND in batch.sources.items()},
                {name: torch.from_numpy(x_N[i : i + 1]) for name, x_N in batch.present.items()},
            )
        )
        for i in range(len(batch))
    ]
    np.testing.assert_array_equal(words_NW, torch.cat(alone))
    assert result["items"] == 120
    assert result["fingerprint"] == tokenizer.codec.spec.fingerprint
    _, counts = np.unique(words_NW, axis=0, return_counts=True)
    assert result["collisions"] == {"items": counts[counts > 1].sum(), "largest": counts.max()}


@pytest.fixture
def in_parts(config, tmp_path, monkeypatch) -> EncodeCorpusConfig:
    """Five row groups, four parts."""
    shutil.copytree(config.data, tmp_path / "data")
    table = pq.read_table(config.data / "items.parquet")
    pq.write_table(table, tmp_path / "data" / "items.parquet", row_group_size=24)
    monkeypatch.setattr(encode_corpus, "_BLOCK", 13)
    monkeypatch.setattr(encode_corpus, "_PART_ITEMS", 30)
    monkeypatch.setattr(encode_corpus, "_FEW_PARTS", 10**6)  # done by this process
    return dataclasses.replace(config, data=tmp_path / "data")


def test_parts_are_the_file(config, in_parts):
    encode_corpus.main(config)
    in_parts = dataclasses.replace(in_parts, out=config.out.with_name("parts"))
    encode_corpus.main(in_parts)
    names = sorted(path.name for path in (in_parts.out / "sids.parquet").iterdir())
    assert names == [f"part-0000{part}.parquet" for part in range(4)]
    assert pq.read_table(in_parts.out / "sids.parquet").equals(pq.read_table(config.out / "sids.parquet"))
    assert open_sids(in_parts.out).read()[0].equals(open_sids(config.out).read()[0])
    part = in_parts.out / "sids.parquet" / names[2]
    pq.write_table(pq.read_table(part), part, compression="none")
    with pytest.raises(DataError, match="not the file that was published, by its checksum"):
        open_sids(in_parts.out).read()


@pytest.mark.parametrize("name", ["local", pytest.param("ray", marks=needs_ray)])
def test_an_engine_writes_the_same_parts(name, in_parts, tmp_path, monkeypatch):
    config = dataclasses.replace(in_parts, report="full")
    one = encode_corpus.main(config)
    monkeypatch.setattr(encode_corpus, "_FEW_PARTS", 2)
    monkeypatch.setitem(ENGINES._entries, "local", lambda: LocalEngine(2))
    shared = dataclasses.replace(config, out=tmp_path / "shared", engine=name)
    monkeypatch.setattr(EncodePart, "_encoded", None)  # in this process
    assert encode_corpus.main(shared) == one
    for path in (config.out / "sids.parquet").iterdir():
        assert (shared.out / "sids.parquet" / path.name).read_bytes() == path.read_bytes()
    assert {path.name for path in shared.out.iterdir()} == {path.name for path in config.out.iterdir()}


def test_a_bad_item_is_named_whoever_meets_it(in_parts, tmp_path, monkeypatch):
    table = pq.read_table(in_parts.data / "items.parquet")
    vectors = [None if v is None else list(v) for v in table["text_emb"].to_pylist()]
    vectors[77][3] = float("nan")
    place = table.schema.get_field_index("text_emb")
    table = table.set_column(place, "text_emb", pa.array(vectors, table["text_emb"].type))
    pq.write_table(table, in_parts.data / "items.parquet", row_group_size=24)
    monkeypatch.setattr(encode_corpus, "_FEW_PARTS", 2)
    monkeypatch.setitem(ENGINES._entries, "local", lambda: LocalEngine(2))
    with pytest.raises(DataError, match=r"items.parquet: column 'text_emb', row 77"):
        encode_corpus.main(in_parts)
    assert not (in_parts.out / "manifest.json").exists()


def test_an_engine_under_torchrun_is_refused(config, run_distributed):
    with pytest.raises(RuntimeError, match="--engine local under torchrun, which started 2 processes to do the work"):
        run_distributed(encode_in_small_blocks, 2, dataclasses.replace(config, engine="local"))


def test_a_killed_run_goes_on_from_whole_parts(in_parts, monkeypatch):
    expected = encode_corpus.main(dataclasses.replace(in_parts, out=in_parts.out.with_name("whole")))
    encoded: list[int] = []
    digits = Tokenizer.digits

    def dying(self, items):
        encoded.append(len(items))
        if sum(encoded) > 80:
            raise OSError("the disk is gone")
        return digits(self, items)

    monkeypatch.setattr(Tokenizer, "digits", dying)
    with pytest.raises(OSError, match="the disk is gone"):
        encode_corpus.main(in_parts)
    assert not (in_parts.out / "manifest.json").exists()
    (parts,) = in_parts.out.glob(".sids.parquet.parts-*")
    (parts / ".part-00003.parquet.host-7-0123456789abcdef.tmp").write_text("half of it")  # by a process that was killed
    encoded[:] = [-1000]
    assert encode_corpus.main(in_parts) == expected
    assert sum(encoded) + 1000 < 70  # of 120 items
    assert {path.name for path in in_parts.out.iterdir()} == {
        path.name for path in in_parts.out.with_name("whole").iterdir()
    }
    for path in (in_parts.out / "sids.parquet").iterdir():
        assert path.read_bytes() == (in_parts.out.with_name("whole") / "sids.parquet" / path.name).read_bytes()


@pytest.mark.parametrize("world_size", [3])
def test_any_number_of_processes_writes_the_same_file(world_size, in_parts, run_distributed, monkeypatch):
    config = dataclasses.replace(in_parts, report="full")
    one = encode_corpus.main(config)
    several = dataclasses.replace(config, out=config.out.with_name("several"))
    results = run_distributed(encode_in_small_blocks, world_size, several)
    for path in (config.out / "sids.parquet").iterdir():
        assert (several.out / "sids.parquet" / path.name).read_bytes() == path.read_bytes()
    for result in results:
        assert result["digits"] == one["digits"]
        assert result["prefixes"] == one["prefixes"]
        assert result["collisions"] == one["collisions"]
        for source, errors in one["reconstruction"].items():
            assert result["reconstruction"][source] == pytest.approx(errors, rel=1e-6)
    assert sorted(path.name for path in several.out.iterdir()) == [
        "codec",
        "manifest.json",
        "metrics.json",
        "run.json",
        "sids.parquet",
    ]


@pytest.mark.parametrize(("block", "world_size"), [(1, 1), (13, 2), (8192, 1)])
def test_items_of_a_grown_corpus_keep_their_sids(
    block, world_size, config, corpus, tmp_path, run_distributed, monkeypatch
):
    """New items before, between and after the old ones, other batches, other processes: an old codec is a fixed function."""
    encode_corpus.main(config)
    old_ids, old_NW = read_sids(config.out, Codec.load(config.out / "codec"))
    table = pq.read_table(corpus / "items.parquet")
    place = table.schema.get_field_index("item_id")
    new = table.set_column(place, "item_id", pa.array(table["item_id"].to_numpy() + 1_000_000))
    grown = tmp_path / "grown"
    grown.mkdir()
    mixed = pa.concat_tables([new[:31], table[60:], new[31:70], table[:60].take(list(range(59, -1, -1))), new[70:]])
    pq.write_table(mixed, grown / "items.parquet", row_group_size=17)
    config = dataclasses.replace(config, data=grown, out=tmp_path / "grown_sids")
    monkeypatch.setattr(encode_corpus, "_BLOCK", block)
    run_distributed(encode_in_small_blocks, 2, config) if world_size == 2 else encode_corpus.main(config)
    ids, words_NW = read_sids(config.out, Codec.load(config.out / "codec"))
    assert len(ids) == 240
    sid_of = dict(zip(ids.tolist(), words_NW.tolist(), strict=True))
    for item_id, words in zip(old_ids.tolist(), old_NW.tolist(), strict=True):
        assert sid_of[item_id] == sid_of[item_id + 1_000_000] == words  # the new items have the content of the old


def test_finished_run_is_read_back_and_another_refused(config, corpus, tmp_path, monkeypatch):
    result = encode_corpus.main(config)
    monkeypatch.setattr(Tokenizer, "encode", None)  # nothing is encoded again
    assert encode_corpus.main(config) == result
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(corpus / "items.parquet", other)
    assert encode_corpus.main(dataclasses.replace(config, data=other)) == result  # the same items elsewhere
    pq.write_table(pq.read_table(corpus / "items.parquet").slice(1), other / "items.parquet")
    with pytest.raises(RunMismatchError, match=r"other inputs \(.*other/items.parquet has changed\)"):
        encode_corpus.main(dataclasses.replace(config, data=other))


def test_sids_of_a_tokenizer_that_was_trained_again_are_refused(config, corpus, tmp_path):
    """The same folders, another codec within: the configurations agree, the fingerprints do not."""
    folder = tmp_path / "tokenizer"
    train = train_tokenizer.TrainTokenizerConfig(data=corpus, out=folder, epochs=0, model=VQFusionOptions(latent_dim=8))
    train_tokenizer.main(train)
    config = dataclasses.replace(config, tokenizer=folder)
    encode_corpus.main(config)
    again = dataclasses.replace(train, out=tmp_path / "again", model=VQFusionOptions(latent_dim=4))
    train_tokenizer.main(again)
    folder.rename(tmp_path / "old")
    again.out.rename(folder)
    with pytest.raises(
        RunMismatchError, match=r"other inputs \(.*tokenizer.json has changed; .*tokenizer.pt has changed\)"
    ):
        encode_corpus.main(config)


def test_items_of_another_width_are_refused(config, corpus, tmp_path):
    folder = tmp_path / "wider"
    folder.mkdir()
    table = pq.read_table(corpus / "items.parquet")
    vectors = pa.array(np.ones((len(table), 5), np.float32).tolist(), pa.list_(pa.float32(), 5))
    place = table.schema.get_field_index("text_emb")
    pq.write_table(table.set_column(place, "text_emb", vectors), folder / "items.parquet")
    with pytest.raises(DataError, match="source 'text_emb' is 5 wide, the tokenizer was trained on 12"):
        encode_corpus.main(dataclasses.replace(config, data=folder))


def test_missing_tokenizer_is_named(config, tmp_path):
    with pytest.raises(DataError, match="nothing.*not found; name a folder train-tokenizer wrote"):
        encode_corpus.main(dataclasses.replace(config, tokenizer=tmp_path / "nothing"))
