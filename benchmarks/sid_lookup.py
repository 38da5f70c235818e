"""What it costs to find the SIDs of items, and the items of SIDs, in ``sids.index``, against what a loader would use otherwise.

    python benchmarks/sid_lookup.py [--items 10000000] [--text-items 1000000] [--batch 65536] [--json FILE]

Ids are drawn from 40 bits, one in ten that are asked for is unknown, and a SID is 25 trits of random digits, so that nearly every item
has its own; batches are new ones each time. Peers, in this run and on one core:

- a dict from id to row, which every process holds by itself;
- a pandas Index and its ``get_indexer``, likewise;
- NumPy's binary search in sorted ids;
- for ids of text, a dict from text to row, asked with Python's strings, as a loader of JSON has them, and with Arrow's.

Times are CPU times of one thread, which what else the machine does disturbs less than a clock's; each is the median over 32 batches.
The dict and the pandas Index are memory that each process holds for itself; the index's pages are the file's, which processes share.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import pyarrow as pa
from comparison import Comparisons

from sidrec_torchrec.codec.alphabet import parse_stages
from sidrec_torchrec.codec.packing import SIDSpec
from sidrec_torchrec.data.sid_index import SIDLookup, write_index
from sidrec_torchrec.data.sids import write_sids

BLOCK = 1 << 18
BATCHES = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000)
    parser.add_argument("--text-items", type=int, default=1_000_000)
    parser.add_argument("--batch", type=int, default=1 << 16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pa.set_cpu_count(1)
    rng = np.random.default_rng(0)
    ids_N = np.unique(rng.integers(0, 1 << 40, arguments.items + arguments.items // 64))
    ids_N = rng.permutation(ids_N)[: arguments.items]
    words_NW = rng.integers(0, 3**25, (len(ids_N), 1))
    results = Comparisons(f"SIDs of {len(ids_N):,} items, {arguments.batch:,} at a time")
    with tempfile.TemporaryDirectory() as name:
        integers(results, Path(name) / "integers", ids_N, words_NW, arguments.batch, rng)
        few = slice(arguments.text_items)
        text(results, Path(name) / "text", ids_N[few], words_NW[few], arguments.batch, rng)
    results.finish(arguments.json)


def integers(
    results: Comparisons, folder: Path, ids_N: np.ndarray, words_NW: np.ndarray, batch: int, rng: np.random.Generator
) -> None:
    lookup = made(folder, pa.array(ids_N), words_NW)
    asked = batches(
        lambda: np.where(rng.random(batch) < 0.1, rng.integers(0, 1 << 40, batch), rng.choice(ids_N, batch))
    )
    words_N = words_NW[:, 0]

    def ours() -> None:
        lookup.lookup(next(asked))

    def reverse() -> None:
        lookup.items_of(rng.choice(words_NW, batch))

    def with_dict() -> None:
        rows = np.fromiter((row_of.get(item, -1) for item in next(asked).tolist()), np.int64, batch)
        np.where(rows >= 0, words_N[rows], -1)

    def with_pandas() -> None:
        rows = index.get_indexer(next(asked))
        np.where(rows >= 0, words_N[rows], -1)

    def with_search() -> None:
        item_M = next(asked)
        at_M = np.minimum(np.searchsorted(sorted_N, item_M), len(sorted_N) - 1)
        np.where(sorted_N[at_M] == item_M, words_N[order_N[at_M]], -1)

    start = time.process_time()
    row_of = dict(zip(ids_N.tolist(), range(len(ids_N)), strict=True))
    build = {"dict": time.process_time() - start}
    start = time.process_time()
    index = pd.Index(ids_N)
    index.get_indexer(ids_N[:1])
    build["pandas Index"] = time.process_time() - start
    start = time.process_time()
    order_N = np.argsort(ids_N)
    sorted_N = ids_N[order_N]
    build["binary search"] = time.process_time() - start
    start = time.process_time()
    SIDLookup.open(folder)
    opened = time.process_time() - start
    own, back, *others = cpu_seconds(ours, reverse, with_dict, with_pandas, with_search)
    for peer, its in zip(build, others, strict=True):
        results.add("integer ids", "million lookups/s", batch / own / 1e6, peer, batch / its / 1e6)
        results.add("integer ids", "seconds to open", opened, peer, build[peer], lower_is_better=True)
    results.add("integer ids", "million SIDs to items/s", batch / back / 1e6, "item to SID", batch / own / 1e6)


def text(
    results: Comparisons, folder: Path, ids_N: np.ndarray, words_NW: np.ndarray, batch: int, rng: np.random.Generator
) -> None:
    text = pa.array([f"B{item:010x}" for item in ids_N.tolist()], pa.large_string())
    lookup = made(folder, text, words_NW)
    row_of = dict(zip(text.to_pylist(), range(len(text)), strict=True))

    def draw() -> pa.Array:
        known = text.take(pa.array(rng.integers(0, len(text), batch - batch // 10)))
        return pa.concat_arrays([known, pa.array([f"C{n}" for n in range(batch // 10)], pa.large_string())])

    asked = batches(draw)
    lists = batches(lambda: draw().to_pylist())

    def ours() -> None:
        lookup.lookup(next(asked))

    def of_strings() -> None:
        lookup.lookup(next(lists))

    def with_dict() -> None:
        get(next(asked).to_pylist())

    def with_dict_of_strings() -> None:
        get(next(lists))

    def get(items: list[str]) -> None:
        rows = np.fromiter((row_of.get(item, -1) for item in items), np.int64, batch)
        np.where(rows >= 0, words_NW[rows, 0], -1)

    arrow, strings, arrow_dict, strings_dict = cpu_seconds(ours, of_strings, with_dict, with_dict_of_strings)
    metric = "million lookups/s"
    results.add("ids of text, Arrow", metric, batch / arrow / 1e6, "dict", batch / arrow_dict / 1e6)
    results.add("ids of text, Python strings", metric, batch / strings / 1e6, "dict", batch / strings_dict / 1e6)


def cpu_seconds(*runs: Callable[[], None]) -> list[float]:
    """The median CPU time of a call of each."""
    medians = []
    for run in runs:
        run()
        times = []
        for _ in range(BATCHES):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        medians.append(median(times))
    return medians


def made(folder: Path, ids: pa.Array, words_NW: np.ndarray) -> SIDLookup:
    """SIDs and their index, opened; says how large it is."""
    spec = SIDSpec(parse_stages("ternary*25"), "f" * 16)
    blocks = [slice(first, first + BLOCK) for first in range(0, len(ids), BLOCK)]
    write_sids(folder / "sids.parquet", spec, ((ids[block], words_NW[block]) for block in blocks), ids.type)
    start = time.process_time()
    path = write_index(folder)
    size = path.stat().st_size / len(ids)
    print(f"{ids.type} ids: index written in {time.process_time() - start:.0f} s, {size:.0f} bytes an item", flush=True)
    return SIDLookup.open(folder)


def batches(draw: Callable) -> Iterator:
    """The same batches again and again: more than caches hold."""
    drawn = [draw() for _ in range(BATCHES)]
    while True:
        yield from drawn


if __name__ == "__main__":
    main()
