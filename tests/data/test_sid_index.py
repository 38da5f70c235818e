"""Finding SIDs by item and items by SID, against dicts; by ids of every type."""

import itertools
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sidrec_torchrec.cli import main
from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import NO_SID, SIDSpec
from sidrec_torchrec.data import ids as ids_module
from sidrec_torchrec.data.sid_index import INDEX_FILE, SIDLookup, write_index
from sidrec_torchrec.data.sid_manifest import Generation, Manifest, generation_file
from sidrec_torchrec.data.sids import write_sids
from sidrec_torchrec.errors import CodecMismatchError, DataError

IDS = {
    "int64": pa.array([5, -1, 0, 2**62, -(2**63), 17, 18, 2**63 - 1], pa.int64()),
    "uint64": pa.array([5, 1, 0, 2**62, 2**64 - 1, 17, 18, 2**63], pa.uint64()),
    "large_string": pa.array(["", "a", "é" * 40, "a\0", "a\0\0", "item 17", "item 18", "x" * 9], pa.large_string()),
    "large_binary": pa.array([b"", b"a", b"\xff" * 40, b"a\0", b"a\0\0", b"17", b"18", b"x" * 9], pa.large_binary()),
}
STRANGERS = {
    "int64": [6, -2, 2**62 + 1],
    "uint64": [6, 2**64 - 2, 2**62 + 1],
    "large_string": ["b", "a\0\0\0", "x" * 8],
    "large_binary": [b"b", b"a\0\0\0", b"x" * 8],
}
DIGITS = [0, 1, 0, 2, 0, 1, 8, 80]  # of eight items: three, two and three alone


def publish(folder: Path, *generations, stages: str = "ternary*4", fingerprint: str = "f" * 16) -> SIDSpec:
    """A folder as encode-corpus writes it, of (ids, words) by generation, added to those there are."""
    spec = SIDSpec(parse_stages(stages), fingerprint)
    manifest = Manifest.read(folder)
    done = manifest.generations if manifest else ()
    for ids, words_NW in generations:
        path = folder / generation_file(len(done))
        write_sids(path, spec, [(ids, np.asarray(words_NW, np.int64))], ids.type)
        done = (*done, Generation.of(path))
    Manifest(spec, done).write(folder)
    return spec


def words_of(digits, stages: str = "ternary*4") -> np.ndarray:
    """Words of numbers, written in as many trits as there are digits."""
    spec = SIDSpec(parse_stages(stages), "f" * 16)
    digits_NL = np.array([[n // 3**j % 3 for j in range(spec.num_digits)] for n in digits])
    return spec.pack(digits_NL[:, ::-1])


def index(folder: Path) -> SIDLookup:
    write_index(folder)
    return SIDLookup.open(folder, verify=True)


@pytest.mark.parametrize("kind", IDS)
@pytest.mark.parametrize("stages", ["ternary*4", "ternary*41"])  # of one word and of two
@pytest.mark.parametrize("collide", [False, True])
def test_items_and_sids_find_each_other(kind, stages, collide, tmp_path, monkeypatch):
    if collide:  # every text has one hash: found by its bytes alone
        monkeypatch.setattr(ids_module, "_hash_bytes", lambda ids: np.zeros(len(ids), np.uint64))
    ids, words_NW = IDS[kind], words_of(DIGITS, stages)
    publish(tmp_path, (ids[:5], words_NW[:5]), (ids[5:], words_NW[5:]), stages=stages)
    lookup = index(tmp_path)
    assert len(lookup) == 8 and str(lookup.id_type) == kind
    order = [7, 0, 0, 3, 1, 2, 6, 5, 4]
    asked = pa.concat_arrays([ids.take(pa.array(order)), pa.array(STRANGERS[kind], ids.type), pa.nulls(2, ids.type)])
    found_words_NW, found_N = lookup.lookup(asked)
    assert found_N.tolist() == [True] * 9 + [False] * 5
    np.testing.assert_array_equal(found_words_NW[:9], words_NW[order])
    assert (found_words_NW[9:] == NO_SID).all() and found_words_NW.dtype == np.int64

    items = {}
    for item, sid in zip(ids.to_pylist(), map(tuple, words_NW.tolist()), strict=True):
        items.setdefault(sid, []).append(item)
    sids_NW = np.concatenate([words_of([80, 0, 40, 1, 0], stages), np.full((1, words_NW.shape[1]), NO_SID)])
    their_ids, starts = lookup.items_of(sids_NW)
    assert their_ids.type == ids.type
    got = [their_ids[a:b].to_pylist() for a, b in itertools.pairwise(starts)]
    assert got == [items.get(tuple(sid), []) for sid in sids_NW.tolist()]
    none, starts = lookup.items_of(sids_NW[:0])
    assert len(none) == 0 and starts.tolist() == [0]
    assert lookup.lookup(ids[:0])[0].shape == (0, words_NW.shape[1])


def test_many_items(tmp_path):
    rng = np.random.default_rng(0)
    ids_N = rng.permutation(np.unique(rng.integers(-(2**62), 2**62, 100_000)))
    words_NW = rng.integers(0, 81, (len(ids_N), 1))
    publish(tmp_path, (pa.array(ids_N), words_NW))
    lookup = index(tmp_path)
    asked_M = np.concatenate([rng.permutation(ids_N), rng.integers(-(2**62), 2**62, 1000)])
    found_words_MW, found_M = lookup.lookup(asked_M)
    sid_of = dict(zip(ids_N.tolist(), words_NW[:, 0].tolist(), strict=True))
    assert found_words_MW[:, 0].tolist() == [sid_of.get(item, NO_SID) for item in asked_M.tolist()]
    assert found_M.tolist() == [item in sid_of for item in asked_M.tolist()]
    ids, starts = lookup.items_of(np.arange(81)[:, None])
    for sid in range(81):
        np.testing.assert_array_equal(ids[starts[sid] : starts[sid + 1]], ids_N[words_NW[:, 0] == sid])


def test_ids_may_be_given_as_any_array_or_list(tmp_path):
    publish(tmp_path, (IDS["int64"], words_of(DIGITS)))
    lookup = index(tmp_path)
    for asked in ([17, 6], np.array([17, 6], np.int32), pa.array([17, 6], pa.uint64()), pa.array(["x"] * 0 + [17, 6])):
        words_NW, found_N = lookup.lookup(asked)
        assert found_N.tolist() == [True, False] and words_NW.tolist() == [[1], [NO_SID]]
    beyond = pa.array([2**64 - 1, 2**63], pa.uint64())  # of the bits of -1 and of the least number, and neither
    assert not lookup.lookup(beyond)[1].any()
    with pytest.raises(DataError, match="sids.index: ids are int64, asked for large_string"):
        lookup.lookup(["17"])
    with pytest.raises(ValueError, match=r"words have shape \(2, 2\) and dtype int64, expected int64 \[N, 1\]"):
        lookup.items_of(np.zeros((2, 2), np.int64))


def test_a_stale_index_is_refused(tmp_path, capsys):
    ids, words_NW = IDS["int64"], words_of(DIGITS)
    publish(tmp_path, (ids[:5], words_NW[:5]))
    with pytest.raises(DataError, match="sids.index: not found; run `sidrec codec index --sids"):
        SIDLookup.open(tmp_path)
    index(tmp_path)
    publish(tmp_path, (ids[5:], words_NW[5:]))
    with pytest.raises(
        DataError, match=r"sids.index: of 5 items, before the folder's SIDs changed \(8 now\); run `sidrec"
    ):
        SIDLookup.open(tmp_path)
    assert main(["codec", "index", "--sids", str(tmp_path)]) == 0
    assert "8 items" in capsys.readouterr().out
    assert SIDLookup.open(tmp_path).lookup(ids)[1].all()
    other = tmp_path / "other"
    publish(other, (ids, words_NW), fingerprint="e" * 16)
    (other / INDEX_FILE).write_bytes((tmp_path / INDEX_FILE).read_bytes())
    with pytest.raises(CodecMismatchError, match="sids.index: of SIDs of codec ffffffff.*holds SIDs of codec eeeeeeee"):
        SIDLookup.open(other)


def test_a_broken_index_is_refused(tmp_path):
    publish(tmp_path, (IDS["large_string"], words_of(DIGITS)))
    index(tmp_path)
    path = tmp_path / INDEX_FILE
    whole = path.read_bytes()
    for broken in (b"", whole[:12], whole[:200], whole[:-1], b"x" + whole[1:], whole[:20] + b"\xff" + whole[21:]):
        path.write_bytes(broken)
        with pytest.raises(DataError, match="sids.index: not an index of SIDs, or a broken one"):
            SIDLookup.open(tmp_path)
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(DataError, match="sids.index: not what was written, by its checksum"):
        SIDLookup.open(tmp_path, verify=True)
    path.write_bytes(whole.replace(b'"format": 1', b'"format": 2', 1))
    with pytest.raises(DataError, match="sids.index: of format 2, this version reads up to 1"):
        SIDLookup.open(tmp_path)


def test_an_index_that_hashes_otherwise_is_refused(tmp_path, monkeypatch):
    publish(tmp_path, (IDS["large_string"], words_of(DIGITS)))
    index(tmp_path)
    monkeypatch.setattr(ids_module, "_hash_bytes", lambda ids: np.full(len(ids), 7, np.uint64))
    with pytest.raises(DataError, match="sids.index: of a version that hashes ids otherwise"):
        SIDLookup.open(tmp_path)


def test_processes_share_the_pages_of_the_file(tmp_path):
    """The file is mapped, and what is read of it is nobody's own memory; sent to a worker, it is opened there."""
    rng = np.random.default_rng(0)
    publish(tmp_path, (pa.array(np.arange(50_000)), rng.integers(0, 81, (50_000, 1))))
    lookup = index(tmp_path)
    sent = pickle.dumps(lookup)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.lookup(np.arange(50_000))[1].all()
    assert not any(array.flags.writeable for array in again.arrays.values())
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("only Linux says which pages are shared")
    regions = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", smaps.read_text())
    mapped = [region for region in regions if region.partition("\n")[0].endswith(INDEX_FILE)]
    sizes = {
        name: sum(int(size) for region in mapped for size in re.findall(rf"^{name}: +(\d+) kB", region, re.MULTILINE))
        for name in ("Rss", "Anonymous")
    }
    assert sizes["Rss"] > 500 and sizes["Anonymous"] == 0


def test_a_folder_of_an_earlier_version(tmp_path):
    spec = SIDSpec(parse_stages("ternary*4"), "f" * 16)
    write_sids(tmp_path / "sids.parquet", spec, [(IDS["int64"], words_of(DIGITS))])
    lookup = index(tmp_path)
    assert lookup.lookup([17])[0].tolist() == [[1]]
    write_sids(tmp_path / "sids.parquet", spec, [(IDS["int64"], words_of(DIGITS[::-1]))])
    with pytest.raises(DataError, match="before the folder's SIDs changed"):
        SIDLookup.open(tmp_path)
