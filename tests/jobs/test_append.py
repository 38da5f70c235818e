"""Adding to an encoded corpus: generations, of which readers see whole ones only, and SIDs that stay as they were published."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.cli import main as cli
from sidrec_torchrec.codec.codec import Codec
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.sid_manifest import Manifest
from sidrec_torchrec.data.sids import open_sids, read_sids, sid_files
from sidrec_torchrec.errors import CodecMismatchError, DataError, RunMismatchError
from sidrec_torchrec.files import read_json, write_json
from sidrec_torchrec.jobs import codec_drift, encode_corpus, predict, train_ranker
from sidrec_torchrec.jobs.encode_corpus import EncodeCorpusConfig
from sidrec_torchrec.ranker.predictor import Predictor
from tests.jobs.test_train_ranker import SMALL, make_config


def cut(corpus: Path, folder: Path, rows, ids=None) -> Path:
    """A data folder with some rows of the corpus's items, in this order, in row groups of 17; ``ids`` makes others of theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(corpus / "items.parquet").take(list(rows))
    if ids is not None:
        place = table.schema.get_field_index("item_id")
        table = table.set_column(place, "item_id", ids(table["item_id"].combine_chunks()))
    pq.write_table(table, folder / "items.parquet", row_group_size=17)
    return folder


@pytest.fixture
def config(corpus: Path, sids: dict[str, Path], tmp_path: Path) -> EncodeCorpusConfig:
    """Of the corpus's first 80 items."""
    tokenizer = sids["side"].parent / "tokenizers" / "side"
    return EncodeCorpusConfig(data=cut(corpus, tmp_path / "old", range(80)), tokenizer=tokenizer, out=tmp_path / "sids")


@pytest.fixture
def more(config, corpus, tmp_path) -> EncodeCorpusConfig:
    """The same with 40 new items among them, in another order, and without the first ten."""
    rows = np.random.default_rng(0).permutation(np.arange(10, 120))
    return dataclasses.replace(config, data=cut(corpus, tmp_path / "new", rows), append=True)


def read(folder: Path) -> dict:
    ids, words_NW = read_sids(folder, Codec.load(folder))
    return dict(zip(ids.to_pylist(), map(tuple, words_NW.tolist()), strict=True))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_only_new_items_are_encoded_and_published_sids_stay(config, more, corpus, sids, capsys, monkeypatch):
    encode_corpus.main(config)
    before, first = read(config.out), (config.out / "sids.parquet").read_bytes()
    encoded = []
    digits = encode_corpus.Tokenizer.digits
    monkeypatch.setattr(
        encode_corpus.Tokenizer, "digits", lambda self, items: encoded.append(len(items)) or digits(self, items)
    )
    result = encode_corpus.main(more)
    assert sum(encoded) == 40
    assert (config.out / "sids.parquet").read_bytes() == first
    everything = read(sids["side"])  # of all 120 at once
    assert read(config.out) == everything and len(before) == 80
    new = pq.read_table(config.out / "sids-00001.parquet")["item_id"].to_pylist()
    file = pq.read_table(more.data / "items.parquet")["item_id"].to_pylist()
    assert new == [item for item in file if item not in before]

    _, counts = np.unique(list(everything.values()), axis=0, return_counts=True)
    shared = {"items": int(counts[counts > 1].sum()), "largest": int(counts.max())}
    assert (result["generation"], result["items"], result["gone"]) == (1, 40, 10)
    assert result["total"] == {"items": 120, "collisions": shared}
    assert result == read_json(config.out / "metrics.json")
    assert "generation 1: 40 items" in capsys.readouterr().err
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["fingerprint"] == result["fingerprint"]
    assert [(g["file"], g["rows"]) for g in manifest["generations"]] == [
        ("sids.parquet", 80),
        ("sids-00001.parquet", 40),
    ]
    assert [path.name for path in sid_files([config.out])] == [
        "sids.parquet",
        "sids-00001.parquet",
        "codec.json",
        "codec.pt",
    ]


def test_nothing_new_writes_nothing(config, more, capsys):
    encode_corpus.main(config)
    encode_corpus.main(more)
    before = contents(config.out)
    result = encode_corpus.main(more)
    assert "nothing new: all 110 items have SIDs" in capsys.readouterr().err
    assert encode_corpus.main(dataclasses.replace(more, append=False)) == result  # a finished run of these items
    encode_corpus.main(dataclasses.replace(config, append=True))  # nor do the old ones have anything new
    assert contents(config.out) == before
    with pytest.raises(
        RunMismatchError, match="old/items.parquet has changed.*add the items it does not have with --append"
    ):
        encode_corpus.main(config)


def test_a_folder_without_any_sids_gets_its_first_generation(config, more, tmp_path):
    result = encode_corpus.main(dataclasses.replace(config, append=True))
    assert result == encode_corpus.main(dataclasses.replace(config, out=tmp_path / "plain"))
    assert encode_corpus.main(config) == result
    assert encode_corpus.main(dataclasses.replace(more, report="full"))["counts"].keys() >= {"text_emb"}


def encode_in_small_blocks(config: EncodeCorpusConfig) -> dict:
    encode_corpus._BLOCK = 13
    return encode_corpus.main(config)


def test_any_number_of_processes_appends_the_same(config, more, run_distributed, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_corpus, "_BLOCK", 13)
    encode_corpus.main(config)
    shutil.copytree(config.out, tmp_path / "one")
    one = encode_corpus.main(dataclasses.replace(more, out=tmp_path / "one"))
    results = run_distributed(encode_in_small_blocks, 2, more)
    assert results[0] == results[1] == one
    assert (more.out / "sids-00001.parquet").read_bytes() == (tmp_path / "one" / "sids-00001.parquet").read_bytes()
    assert sorted(contents(more.out)) == sorted(contents(tmp_path / "one"))


def killed(call: int, config: EncodeCorpusConfig) -> bool:
    """Appends in a process that dies before its ``call``-th change of the disk; whether it did."""
    child = os.fork()
    if child == 0:
        left = iter(range(call))

        def dying(original):
            def change(*args, **kwargs):
                if next(left, None) is None:
                    os._exit(9)  # nothing is tidied up, as after SIGKILL
                return original(*args, **kwargs)

            return change

        os.replace, os.rmdir = dying(os.replace), dying(os.rmdir)
        pq.ParquetWriter.write_batch = dying(pq.ParquetWriter.write_batch)
        pq.ParquetWriter.write_table = dying(pq.ParquetWriter.write_table)
        try:
            encode_corpus.main(config)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def test_an_append_that_is_killed_is_as_if_it_had_not_begun_or_had_ended(config, more, tmp_path):
    encode_corpus.main(config)
    before = read(config.out)
    shutil.copytree(config.out, tmp_path / "whole")
    expected = encode_corpus.main(dataclasses.replace(more, out=tmp_path / "whole"))
    after, files = read(tmp_path / "whole"), sorted(contents(tmp_path / "whole"))
    seen = []
    for call in range(100):
        out = shutil.copytree(config.out, tmp_path / f"killed{call}")
        if not killed(call, dataclasses.replace(more, out=out)):
            break
        assert read(out) in (before, after)
        seen.append(len(read(out)))
        assert encode_corpus.main(dataclasses.replace(more, out=out)) == expected
        assert read(out) == after
        assert sorted(contents(out)) == files
    assert call > 8 and {80, 120} == set(seen)


def test_a_changed_byte_is_refused(config, more):
    encode_corpus.main(config)
    encode_corpus.main(more)
    path = config.out / "sids-00001.parquet"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(4, len(whole) - 4, 5).tolist():
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(DataError, match=r"sids-00001.parquet"):
            read(config.out)
    path.write_bytes(whole)
    assert len(read(config.out)) == 120
    shutil.copy(config.out / "sids.parquet", path)
    with pytest.raises(DataError, match=r"sids-00001.parquet: holds 80 SIDs of .*manifest.json says 40"):
        open_sids(config.out)
    path.unlink()
    with pytest.raises(DataError, match=r"sids-00001.parquet: not found"):
        open_sids(config.out)


def test_a_manifest_that_cannot_be_right_is_refused(config):
    encode_corpus.main(config)
    path = config.out / "manifest.json"
    value = read_json(path)
    for change, message in (
        ({"format": 2}, "of format 2, but this version of sidrec_torchrec reads formats up to 1; install a newer"),
        ({"generations": []}, "not a manifest of SIDs, or a broken one"),
        ({"generations": value["generations"] * 2}, "generations are missing, or in another order"),
        ({"generations": [{"file": "sids.parquet"}]}, "not a manifest of SIDs, or a broken one"),
    ):
        write_json(path, value | change, sealed=True)
        with pytest.raises(DataError, match=f"manifest.json: .*{message}"):
            open_sids(config.out)
    path.write_text("{")
    with pytest.raises(DataError, match="manifest.json: not JSON, or cut short"):
        open_sids(config.out)


def test_a_folder_of_an_earlier_version_is_generation_0(config, more):
    """Which wrote no manifest; but one that has lost it is not taken for such a one."""
    result = encode_corpus.main(config)
    (config.out / "manifest.json").unlink()
    assert len(read(config.out)) == 80
    before = contents(config.out)
    assert encode_corpus.main(config) == result
    encode_corpus.main(dataclasses.replace(config, append=True))
    assert contents(config.out) == before
    encode_corpus.main(more)
    assert len(read(config.out)) == 120
    first, _ = Manifest.read(config.out).generations
    assert {"fingerprint": result["fingerprint"]} | first.report == result
    (config.out / "manifest.json").unlink()
    with pytest.raises(DataError, match="sids: holds sids-00001.parquet, but no manifest.json"):
        read(config.out)


def test_another_codec_is_refused(config, more, sids):
    encode_corpus.main(config)
    before = contents(config.out)
    other = dataclasses.replace(more, tokenizer=sids["side"].parent / "tokenizers" / "text")
    with pytest.raises(CodecMismatchError, match="sids holds SIDs: made with codec .*use the tokenizer that made them"):
        encode_corpus.main(other)
    assert contents(config.out) == before


def test_ids_of_text_and_of_another_type(config, corpus, tmp_path):
    def text(ids):
        return pa.array([f"item {i}" for i in ids.to_pylist()])

    config = dataclasses.replace(config, data=cut(corpus, tmp_path / "text", range(80), text))
    encode_corpus.main(config)
    more = dataclasses.replace(config, append=True, data=cut(corpus, tmp_path / "more", range(40, 120), text))
    encode_corpus.main(more)
    assert sorted(read(config.out)) == sorted(
        f"item {i}" for i in pq.read_table(corpus / "items.parquet")["item_id"].to_pylist()
    )
    numbers = dataclasses.replace(more, data=corpus)
    with pytest.raises(
        DataError, match="items.parquet: ids are int64, in .*sids they are large_string; write both with one type"
    ):
        encode_corpus.main(numbers)


def test_drift_of_a_generation_against_those_before(config, more, tmp_path, capsys):
    config, more = (dataclasses.replace(c, report="full") for c in (config, more))
    first = encode_corpus.main(config)
    with pytest.raises(DataError, match="sids.parquet: holds one generation; name --old to compare it with"):
        codec_drift.main(codec_drift.CodecDriftConfig(new=config.out))
    second = encode_corpus.main(more)
    assert cli(["codec", "drift", "--new", str(config.out), "--json", str(tmp_path / "drift.json")]) == 0
    report, printed = json.loads((tmp_path / "drift.json").read_text()), capsys.readouterr().out
    assert (report["old"]["items"], report["new"]["items"], report["common_items"]) == (80, 40, 0)
    assert len(report["digits"]) == 10 and report["prefixes"] == []
    quality = report["quality"]["new"]
    assert report["quality"].keys() == {"new"}
    every = list(read(config.out).values())
    parts = [every[:80], every[80:]]
    for number, (one, result) in enumerate(zip(quality["generations"], (first, second), strict=True)):
        own, known = parts[number], parts[0] if number else []
        assert one["items"] == len(own)
        assert one["unique"] == pytest.approx(len(set(own)) / len(own))
        assert one["colliding"] == pytest.approx(sum((own + known).count(sid) > 1 for sid in own) / len(own))
        assert one["largest"] == max(map(own.count, own))
        assert one["entropy"] == pytest.approx(result["digits"]["entropy"])
        assert one["reconstruction"] == {name: errors[-1] for name, errors in result["reconstruction"].items()}
    counts = np.array([every.count(sid) for sid in sorted(set(every))])
    expected = np.abs(counts[:, None] - counts).mean() / 2 / counts.mean()
    assert quality["all"]["gini"] == pytest.approx(expected)
    for source, error in quality["all"]["reconstruction"].items():
        weights = [result["counts"][source] for result in (first, second)]
        errors = [result["reconstruction"][source][-1] for result in (first, second)]
        assert error == pytest.approx(np.average(errors, weights=weights))
    assert "new, generation 1" in printed and "new, all" in printed


def test_a_ranker_reads_what_came_after_it_was_trained(corpus, sids, tmp_path):
    """Trained on generation 0; then items come between the others, one goes, and the ranker scores the new ones too."""
    data = shutil.copytree(corpus, tmp_path / "data")
    encoded = tmp_path / "side"
    encode = EncodeCorpusConfig(data=data, tokenizer=sids["side"].parent / "tokenizers" / "side", out=encoded)
    encode_corpus.main(encode)
    protocol = PrepareConfig(max_history=48, targets_per_row=32)
    sequences = prepare(data, tmp_path / "sequences", protocol).folder
    codes = dataclasses.replace(SMALL, attention="codes")
    ranker = make_config(data, sequences, {"side": encoded}, tmp_path / "run", "side", model=codes, epochs=1)
    train_ranker.main(ranker)
    events, items = (pq.read_table(data / f"{name}.parquet") for name in ("events", "items"))
    requests = events.slice(0, 300).select(["user_id", "item_id", "timestamp"])
    before = Predictor.open(ranker.out).predict(requests)

    used = set(events["item_id"].to_pylist())
    unused = [row for row, item in enumerate(items["item_id"].to_pylist()) if item not in used]
    twins = items.take([3, 4]).set_column(
        items.schema.get_field_index("item_id"), "item_id", pa.array([10**6, 10**6 + 1])
    )
    kept = items.take([row for row in range(len(items)) if row not in unused[:1]])
    pq.write_table(pa.concat_tables([twins.slice(0, 1), kept, twins.slice(1, 1)]), data / "items.parquet")
    anew = prepare(data, tmp_path / "anew", protocol).folder
    with pytest.raises(
        DataError, match=r"side: has no SID of item_id 1000000 and 1 more of .*; add those with encode-corpus --append"
    ):
        Predictor.open(ranker.out, prepared=anew)
    assert encode_corpus.main(dataclasses.replace(encode, append=True))["items"] == 2

    predictor = Predictor.open(ranker.out, prepared=anew)
    np.testing.assert_allclose(predictor.predict(requests), before, rtol=0, atol=1e-6)
    scores = []
    for table in (twins, items.take([3, 4])):
        asked = requests.set_column(
            1, "item_id", pa.chunked_array([table["item_id"].take([0, 1] * 150).combine_chunks()])
        )
        pq.write_table(asked, tmp_path / "requests.parquet")
        flags = predict.PredictConfig(ranker=ranker.out, prepared=anew, requests=tmp_path / "requests.parquet", out=tmp_path / "out.parquet")  # fmt: skip
        predict.main(flags)
        scores.append(pq.read_table(flags.out)["probability"].to_numpy())
    np.testing.assert_allclose(*scores, rtol=0, atol=1e-6)
    assert scores[0].std() > 1e-4
    with pytest.raises(RunMismatchError, match="made from other inputs"):
        train_ranker.main(ranker)
