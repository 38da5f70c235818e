"""The items of a fractal expansion: children with their parent's columns, and content that is partly their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sidrec_torchrec.data.columns import is_index, storage_type, vector_lists
from sidrec_torchrec.data.event_log import parquet_writer
from sidrec_torchrec.data.fractal_matrix import likeness_order
from sidrec_torchrec.data.items import Items
from sidrec_torchrec.files import atomic_path

_ROWS = 8192
_DIRECTIONS = 64  # in which a source's noise lies: those in which its items differ most
_LIKE_DIMS = 16


@dataclass(frozen=True)
class ChildIds:
    """Ids of children, of which each parent's is read off; made by ``ChildIds.of``.

    Args:
        parents: canonical [N].
        times: children of each.
        are_numbers: whether they are whole numbers.
        base_N: of numbers: the first child's id, int64 [N].
        words: how they are made, for people.
    """

    parents: pa.Array
    times: int
    are_numbers: bool
    base_N: np.ndarray
    words: str

    @staticmethod
    def of(parents: pa.Array, times: int) -> "ChildIds":
        """Numbers stay numbers, text and bytes what they are."""
        nothing = np.zeros(0, np.int64)
        if not pa.types.is_integer(parents.type):
            return ChildIds(parents, times, False, nothing, "the parent's, '#' and the number of the block")
        most = (1 << 63) // times - 1
        low, high = (value.as_py() for value in pc.min_max(parents).values())
        if -most <= low and high <= most:
            base_N = parents.cast(pa.int64()).to_numpy() * times
            return ChildIds(parents, times, True, base_N, f"the parent's times {times}, plus the number of the block")
        base_N = np.arange(len(parents)) * times
        return ChildIds(parents, times, True, base_N, f"the parent's place times {times}, plus the number of the block")

    @property
    def type(self) -> pa.DataType:
        """Of the ids: int64, large_string or large_binary."""
        return pa.int64() if self.are_numbers else self.parents.type

    def take(self, place_M: np.ndarray, block_M: np.ndarray) -> pa.Array:
        """Ids of M children, given the places of their parents and the numbers of their blocks."""
        if self.are_numbers:
            return pa.array(self.base_N[place_M] + block_M)
        marks = pa.array([f"#{block}" for block in range(self.times)]).cast(self.type)
        parts = self.parents.take(pa.array(place_M)), marks.take(pa.array(block_M))
        return pc.binary_join_element_wise(*parts, pa.scalar("", self.type))


@dataclass(frozen=True)
class _Spread:
    """How a source's vectors differ: D wide, R directions.

    Args:
        mean_D: of those that are there.
        factor_RD: a standard normal vector times it has their covariance, but for the smallest directions, whose share
            of the variance the others have.
    """

    mean_D: np.ndarray
    factor_RD: np.ndarray


def content_order(items: Items) -> np.ndarray:
    """The items so that those of like content are neighbours, int64 [num_items]; sources count alike, whatever their scale."""
    spreads = {name: _spread(items, name, _LIKE_DIMS) for name in items.source_dims}
    rows = []
    for batch in items.batches(_ROWS, targets=()):
        parts = []
        for name, spread in spreads.items():
            variance_R = (spread.factor_RD**2).sum(axis=1)
            directions_DR = spread.factor_RD.T / np.sqrt(np.maximum(variance_R, 1e-30))
            x_ND = (batch.sources[name] - spread.mean_D) * batch.present[name][:, None]
            parts.append(x_ND @ directions_DR / np.sqrt(max(variance_R.sum(), 1e-30)))
        rows.append(np.concatenate(parts, axis=1))
    return likeness_order(np.concatenate(rows), 1)


def write_items(path: Path, items: Items, children: ChildIds, own: float, seed: int) -> None:
    """Writes all children, block by block.

    A child's vector is ``mean + sqrt(1 - own) (parent - mean) + sqrt(own / 2) (block + self)``, of its parent's length:
    ``block`` is drawn once for all items of a block, ``self`` for each item, both with the covariance of the source. So
    vectors are spread as the log's are, siblings differ, and content says the block as well as the parent. Other
    columns are the parent's.

    Args:
        path: the file.
        items: the log's.
        children: ids.
        own: share of the variance that is not the parent's, in [0, 1).
        seed: of the draws.
    """
    spreads = {name: _spread(items, name, _DIRECTIONS) for name in items.source_dims}
    table = items.table
    others = [f for f in table.schema if f.name not in ("item_id", *items.source_dims) and not is_index(f.name)]
    kept = pa.Table.from_batches([b for _, b in table.batches([f.name for f in others], _ROWS)]) if others else None
    numbers = {name: _number_type(items, name) for name in items.source_dims}
    sources = [(name, pa.list_(numbers[name])) for name in items.source_dims]
    schema = pa.schema([("item_id", children.type), *(f.remove_metadata() for f in others), *sources])
    with atomic_path(path) as temporary, parquet_writer(temporary, schema) as writer:
        for block in range(children.times):
            for place_N, vectors in _vectors(items, spreads, own, [seed, 2, block]):
                ids = children.take(place_N, np.full(len(place_N), block))
                rest = [] if kept is None else kept.slice(place_N[0], len(place_N)).columns
                columns = [ids, *rest, *(vectors[name].cast(kind) for name, kind in sources)]
                writer.write_table(pa.table(columns, schema=schema))


def _vectors(
    items: Items, spreads: dict[str, _Spread], own: float, seed: list[int]
) -> Iterator[tuple[np.ndarray, dict[str, pa.Array]]]:
    """Places and vectors of some consecutive items of a block; null where the parent has none."""
    shared = {
        name: np.random.default_rng([*seed, 0, number]).normal(size=len(spread.factor_RD))
        for number, (name, spread) in enumerate(spreads.items())
    }
    for batch in items.batches(_ROWS, targets=()):
        rng = np.random.default_rng([*seed, 1, batch.first_row])
        columns = {}
        for name, spread in spreads.items():
            x_ND, present_N = batch.sources[name].astype(np.float64), batch.present[name]
            own_NR = shared[name] + rng.normal(size=(len(batch), len(spread.factor_RD)))
            child_ND = spread.mean_D + np.sqrt(1 - own) * (x_ND - spread.mean_D)
            child_ND += np.sqrt(own / 2) * own_NR @ spread.factor_RD
            length_N1, child_length_N1 = (np.linalg.norm(v, axis=1, keepdims=True) for v in (x_ND, child_ND))
            child_ND *= length_N1 / np.maximum(child_length_N1, 1e-30)
            columns[name] = vector_lists(child_ND.astype(np.float32), present_N)
        yield batch.first_row + np.arange(len(batch)), columns


def _number_type(items: Items, name: str) -> pa.DataType:
    """float16 where the log's vectors are; else float32."""
    table = items.table if name in items.table.schema.names or items.embeddings is None else items.embeddings.table
    kind = storage_type(table.type_of(name))
    return pa.float16() if kind.value_type == pa.float16() else pa.float32()


def _spread(items: Items, name: str, directions: int) -> _Spread:
    """In one pass over a source's vectors that are there."""
    dim, count = items.source_dims[name], 0
    sum_D, gram_DD = np.zeros(dim), np.zeros((dim, dim))
    for batch in items.batches(_ROWS, sources=(name,), targets=()):
        x_ND = batch.sources[name][batch.present[name]].astype(np.float64)
        count += len(x_ND)
        sum_D += x_ND.sum(axis=0)
        gram_DD += x_ND.T @ x_ND
    mean_D = sum_D / max(count, 1)
    variance_D, vector_DD = np.linalg.eigh(gram_DD / max(count, 1) - np.outer(mean_D, mean_D))
    variance_D = np.maximum(variance_D, 0.0)
    kept = np.argsort(-variance_D, kind="stable")[:directions]
    whole = variance_D.sum() / max(variance_D[kept].sum(), 1e-30)
    return _Spread(mean_D, np.sqrt(whole * variance_D[kept])[:, None] * vector_DD[:, kept].T)
