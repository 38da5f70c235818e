"""Files of ours that were cut short, or cannot be written: the error names them, and nothing half written is left."""

import resource
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sidrec_torchrec.data.batches import SequenceBatches
from sidrec_torchrec.data.collaborative import CollaborativeConfig, collaborative_vectors
from sidrec_torchrec.data.fingerprint import files_fingerprint
from sidrec_torchrec.data.item_arrays import map_rows, write_rows
from sidrec_torchrec.data.prepare import PrepareConfig, prepare
from sidrec_torchrec.data.prepared import Prepared, open_prepared
from sidrec_torchrec.errors import DataError
from sidrec_torchrec.part_files import part_path
from sidrec_torchrec.ranker.arms import ArmConfig, ArmInputs, NoneArm


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    rng = np.random.default_rng(0)
    events = {
        "user_id": np.repeat(np.arange(20), 30),
        "item_id": rng.integers(0, 10, 600),
        "timestamp": np.arange(600),
        "label": rng.integers(0, 2, 600).astype(np.int8),
    }
    pq.write_table(pa.table({"item_id": np.arange(10)}), tmp_path / "items.parquet")
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    return prepare(tmp_path, tmp_path / "sequences", PrepareConfig())


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(path: Path) -> None:
    """Overwrites the data, not the footer."""
    content = bytearray(path.read_bytes())
    content[4:600] = b"\xff" * 596
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut_short, spoil, Path.unlink])
def test_sequences(prepared: Prepared, damage):
    damage(part_path(prepared.path("train"), 0))
    with pytest.raises(DataError, match=r"train: not whole sequences, or cut short: .*part-00000.*; prepare again"):
        arm = NoneArm(ArmInputs(num_items=prepared.num_items), ArmConfig())
        list(SequenceBatches(prepared, "train", arm, batch_events=512))
    with pytest.raises(DataError, match=r"train: not whole sequences, or cut short: .*part-00000.*; prepare again"):
        collaborative_vectors(prepared, CollaborativeConfig())


def test_what_stands_beside_them(prepared: Prepared, tmp_path):
    cut_short(prepared.folder / "seen.npy")
    with pytest.raises(DataError, match=r"seen\.npy: not an array, or cut short"):
        prepared.seen()
    (prepared.folder / "prepared.json").write_text("{}")
    with pytest.raises(DataError, match=r"prepared\.json: of another version .*; prepare again"):
        open_prepared(prepared.folder)
    cut_short(tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"items\.parquet: not a Parquet file, or cut short"):
        files_fingerprint([tmp_path / "items.parquet"])


def test_arrays(tmp_path):
    path = tmp_path / "rows.npy"
    rows_ND = np.random.default_rng(0).normal(size=(1000, 4))
    write_rows(path, (1000, 4), np.float16, iter([rows_ND[:300], rows_ND[300:]]))
    np.testing.assert_array_equal(map_rows(path), rows_ND.astype(np.float16))
    assert map_rows(path).dtype == np.float16
    cut_short(path)
    with pytest.raises(DataError, match=r"rows\.npy: not an array, or cut short"):
        map_rows(path)


def test_on_a_full_disk_nothing_half_written_is_left(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_rows(tmp_path / "rows.npy", (1000, 4), np.int64, (np.ones((100, 4)) for _ in range(10)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
