"""``sidrec codec design`` from an item file to a choice."""

import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec import cli
from sidrec_torchrec.jobs.codec_design import CodecDesignConfig, draw


def write_items(path, vectors):
    table = {"item_id": pa.array(range(len(vectors))), "emb": pa.array(vectors, pa.list_(pa.float32()))}
    pq.write_table(pa.table(table), path)


def test_the_command_prints_candidates_and_a_choice(corpus, capsys):
    arguments = ["--source", "text_emb", "--bits", "6", "--iterations", "2", "--beams", "1,2", "--items"]
    assert cli.main(["codec", "design", *arguments, str(corpus)]) == 0
    printed = capsys.readouterr().out
    assert "fitted on 87 items, measured on 29" in " ".join(printed.split())
    for stages in ("ternary*3", "onehot:64", "onehot:16,onehot:4"):
        assert stages in printed
    assert "\nChosen: " in printed


def test_items_without_the_source_are_left_out(tmp_path):
    file = tmp_path / "items.parquet"
    write_items(file, [[1.0, 2.0], None, [0.0, 0.0], [3.0, 4.0], [5.0, 6.0]])
    x_ND = draw(CodecDesignConfig(items=file, source="emb", bits=4))
    assert sorted(x_ND.tolist()) == [[1, 2], [3, 4], [5, 6]]
    assert len(draw(CodecDesignConfig(items=file, source="emb", bits=4, max_items=2))) == 2


@pytest.mark.parametrize(
    "vectors, source, message",
    [
        ([[1.0, 2.0], None], "emb", "column 'emb' holds 1 vectors in the items drawn"),
        ([[1.0, 2.0], [3.0, 4.0]], "text", "no source 'text'; available: 'emb'"),
        ([[1.0, 2.0], [float("nan"), 4.0]], "emb", r"column 'emb', row 1 \(item_id 1\): value 0 is nan"),
    ],
)
def test_bad_items_are_named(tmp_path, capsys, vectors, source, message):
    file = tmp_path / "items.parquet"
    write_items(file, vectors)
    assert cli.main(["codec", "design", "--items", str(file), "--source", source, "--bits", "4"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_impossible_configs_are_refused(tmp_path):
    for wrong in ({"bits": 1}, {"max_items": 1}, {"held_out": 1.0}):
        with pytest.raises(ValueError, match="at least|must lie"):
            CodecDesignConfig(**{"items": tmp_path, "source": "emb", "bits": 8} | wrong)
