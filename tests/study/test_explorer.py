"""The sample of SIDs on the page: the same every time, small, and what the files say."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.folder import DataFolder
from sidrec_torchrec.data.sids import write_sids
from sidrec_torchrec.study.explorer import MOST_ITEMS, explore
from sidrec_torchrec.study.report_html import write_html

ITEMS = 5_000


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A data folder, folders of two tokenizers' SIDs, and their digits by item."""
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    ids = pa.array([f"item-{number:05}" for number in rng.permutation(ITEMS)])
    titles = pa.array([None if number % 97 == 0 else f"<b>title</b> {number} " * 12 for number in range(ITEMS)])
    tags = pa.array([["one", "two"] if number % 2 else [] for number in range(ITEMS)])
    items = {"item_id": ids, "title": titles, "tags": tags, "emb": pa.array([[1.0, 2.0]] * ITEMS)}
    pq.write_table(pa.table(items), folder / "items.parquet")
    sids, digits = {}, {}
    for name, stages in (("fused", "ternary*39"), ("text", "onehot:256*3")):
        spec = SIDSpec(parse_stages(stages), "ab" * 8)
        digits_NL = np.stack([rng.integers(0, radix, ITEMS) for radix in spec.radices], axis=1)
        some = ITEMS if name == "fused" else ITEMS - 10
        sids[name] = folder / name
        sids[name].mkdir()
        write_sids(
            sids[name] / "sids.parquet", spec, [(ids[:some], spec.pack(digits_NL[:some].astype(np.int16)))], pa.string()
        )
        digits[name] = dict(zip(ids[:some].to_pylist(), digits_NL[:some].tolist()))
    return DataFolder.of(folder), sids, digits


def test_it_shows_what_the_files_say(corpus):
    data, sids, digits = corpus
    explorer = explore(data, sids)
    assert explorer.items == ITEMS and len(set(explorer.ids)) == MOST_ITEMS == len(explorer.texts)
    assert explorer.columns == ("title", "tags")
    for name, own in explorer.digits.items():
        assert own == [digits[name].get(item) for item in explorer.ids]
    rows = pq.read_table(data.path / "items.parquet").to_pylist()
    words = {row["item_id"]: f"{row['title'] or ''} {' '.join(row['tags'])}".split() for row in rows}
    for item, text in zip(explorer.ids, explorer.texts, strict=True):
        assert (
            len(text) <= 160 and text.replace("·", "").replace(",", "").removesuffix("…").split()[:3] == words[item][:3]
        )


def test_it_is_the_same_every_time_and_small(corpus, make_report, tmp_path):
    data, sids, _ = corpus
    explorer = explore(data, sids)
    assert explorer == explore(data, sids)
    write_html(make_report(), tmp_path / "report.html", explorer)
    page = (tmp_path / "report.html").read_text()
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert "2,000 of the 5,000 items, drawn at random" in page and "<b>title" not in page


def test_many_digits_are_fewer_items(corpus, monkeypatch):
    data, sids, _ = corpus
    monkeypatch.setattr("sidrec_torchrec.study.explorer._MOST_DIGITS", 4_200)
    assert len(explore(data, sids).ids) == 4_200 // 42
    assert explore(data, {}) is None
