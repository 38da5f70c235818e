"""Arrays on disk: readable as any ``.npy``, and not taken for what was written if they have changed."""

import numpy as np
import pytest

from sidrec_torchrec.data.item_arrays import map_rows, write_rows
from sidrec_torchrec.errors import DataError

ROWS = np.arange(1000, dtype=np.int64).reshape(100, 10)


def test_any_reader_of_npy_reads_it(tmp_path):
    path = tmp_path / "a.npy"
    write_rows(path, ROWS.shape, np.int64, iter([ROWS[:33], ROWS[33:]]))
    for read in (map_rows, np.load, lambda path: np.load(path, mmap_mode="r")):
        np.testing.assert_array_equal(read(path), ROWS)


def test_a_flipped_bit_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "a.npy"
    write_rows(path, ROWS.shape, np.int64, iter([ROWS]))
    content = path.read_bytes()
    for place in np.random.default_rng(0).integers(0, 8 * len(content), 200):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"a\.npy: not an array, or cut short"):
            map_rows(path)
    monkeypatch.setenv("SIDREC_VERIFY", "off")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path.write_bytes(flipped)
    assert (map_rows(path) != ROWS).sum() == 1


def test_what_was_cut_or_continued_is_seen(tmp_path):
    path = tmp_path / "a.npy"
    write_rows(path, ROWS.shape, np.int64, iter([ROWS]))
    content = path.read_bytes()
    for changed in (content[:-50], content[:-1], content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(DataError, match="not an array, or cut short"):
            map_rows(path)


def test_arrays_of_earlier_versions_have_no_digest(tmp_path):
    np.save(tmp_path / "a.npy", ROWS)
    np.testing.assert_array_equal(map_rows(tmp_path / "a.npy"), ROWS)
