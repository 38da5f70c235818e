"""Frames of other libraries: what is read of them is what is read of the Parquet file that they could have been."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sidrec_torchrec.data.folder import DataSchema
from sidrec_torchrec.data.format import open_events, open_items, open_users
from sidrec_torchrec.data.frames import read_frame
from sidrec_torchrec.data.parquet import ArrowTable
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.fusion.config import QuantizerConfig, VQFusionConfig
from sidrec_torchrec.fusion.item_tensors import ItemStream
from sidrec_torchrec.fusion.model import VQFusion
from sidrec_torchrec.fusion.tokenizer import Tokenizer

N = 50


class Foreign:
    """Of a library that nobody has heard of: the protocol is all that there is."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


def of(library: str) -> Callable[[pa.Table], Any]:
    """What makes a library's frame of an Arrow table; the test is skipped where it is not installed."""
    if library == "foreign":
        return Foreign
    module = pytest.importorskip(library, reason=f"{library} is not installed")
    return {
        "pandas": lambda table: table.to_pandas().set_index(np.arange(len(table))[::-1]),
        "polars": lambda table: module.from_arrow(table),
        "duckdb": lambda table: module.from_arrow(table),
        "datasets": lambda table: module.Dataset(module.table.InMemoryTable(table)),
    }[library]


each_library = pytest.mark.parametrize("library", ["foreign", "pandas", "polars", "duckdb", "datasets"])


def items(seed: int = 0) -> pa.Table:
    x_ND = np.random.default_rng(seed).normal(size=(N, 6)).astype(np.float32)
    return pa.table(
        {
            "sku": [f"item {i}" for i in range(N)][::-1],
            "item_id": [f"{i:03}" for i in range(N)][::-1],
            "text": pa.array([None if i % 7 == 0 else x.tolist() for i, x in enumerate(x_ND)], pa.list_(pa.float32())),
            "kind": pa.array([None if i % 5 == 0 else "ab"[i % 2] for i in range(N)]).dictionary_encode(),
        }
    )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    torch.manual_seed(0)
    model = VQFusion(VQFusionConfig(sources={"text": 6}, latent_dim=8, quantizer=QuantizerConfig(stages="ternary*10")))
    (block,) = (tensors for _, tensors in ItemStream.open(items(), ("text",), {}).blocks())
    model.start(block)
    return Tokenizer(model, {})


@each_library
def test_items_are_those_of_a_file(library, tmp_path):
    pq.write_table(items(), tmp_path / "items.parquet")
    file, frame = open_items(tmp_path), open_items(of(library)(items()))
    assert frame.source_dims == file.source_dims == {"text": 6}
    assert set(frame.categorical) == {"kind", "sku"} and frame.ids().equals(file.ids())
    (one,), (other,) = file.batches(), frame.batches()
    np.testing.assert_array_equal(one.sources["text"], other.sources["text"])
    np.testing.assert_array_equal(one.present["text"], other.present["text"])
    assert one.targets["kind"].to_pylist() == other.targets["kind"].to_pylist()


@each_library
def test_events_and_users_are_those_of_a_file(library, tmp_path):
    rng = np.random.default_rng(0)
    log = {"user": rng.integers(9, size=N), "item_id": rng.integers(9, size=N), "timestamp": np.arange(N)}
    log = pa.table(log | {"label": rng.integers(2, size=N)})
    pq.write_table(log, tmp_path / "log.parquet")
    schema = DataSchema(columns=("user_id=user",))
    (one,), (other,) = (
        open_events(data, schema=schema).batches() for data in (tmp_path / "log.parquet", of(library)(log))
    )
    assert one.user_ids.equals(other.user_ids) and one.item_ids.equals(other.item_ids)
    np.testing.assert_array_equal(one.timestamps, other.timestamps)
    np.testing.assert_array_equal(one.labels, other.labels)
    users = open_users(of(library)(pa.table({"user_id": [1, 2], "city": ["x", None]})))
    assert users is not None and users.categorical == ("city",)


@each_library
def test_a_tokenizers_frame_keeps_rows_and_columns(library, tokenizer):
    table = items()
    (expected_NW,) = (tokenizer.encode(block) for _, block in ItemStream.open(table, ("text",), {}).blocks())
    encoded = tokenizer.encode_table(of(library)(table))
    assert encoded.schema.names == ["sku", "item_id", "text", "kind", "sid"]
    assert encoded["sid"].to_pylist() == expected_NW[:, 0].tolist() and encoded["sid"].type == pa.int64()
    for name in ("sku", "item_id", "kind"):
        assert encoded[name].to_pylist() == table[name].to_pylist()
    if library not in ("foreign", "datasets"):  # and back
        back = encoded.to_pandas() if library == "pandas" else of(library)(encoded)
        assert read_frame(back, "back")["sid"].to_pylist() == expected_NW[:, 0].tolist()


def test_batches_of_a_table_are_its_rows_in_order():
    table = pa.concat_tables([pa.table({"a": [1, 2, 3]}), pa.table({"a": [4, 5, 6, 7]})])
    own = ArrowTable.of(table, "t", {"ours": "a"})
    read = [(row, batch.column(0).to_pylist()) for row, batch in own.batches(["ours"], 2)]
    assert read == [(0, [1, 2]), (2, [3, 4]), (4, [5, 6]), (6, [7])]
    shares = [[row for row, _ in own.batches(["ours"], 2, [0], share=(rank, 3))] for rank in range(3)]
    assert shares == [[0], [2], [4, 6]]
    assert own.at("ours", 3) == "t: column 'a', row 3"


def test_bad_values_are_named_by_column_and_row(tokenizer):
    table = items()
    rows = table.to_pylist()
    rows[8]["text"] = [1.0, 2.0]
    with pytest.raises(DataError, match=r"items: column 'text', row 8 \(item_id '041'\): 2 values, expected 6"):
        tokenizer.encode_table(pa.Table.from_pylist(rows))
    rows[8]["text"] = [1.0, 2.0, 3.0, float("nan"), 0.0, 0.0]
    with pytest.raises(DataError, match="items: column 'text', row 8 .item_id '041'.: value 3 is nan"):
        tokenizer.encode_table(pa.Table.from_pylist(rows))
    with pytest.raises(DataError, match="items: no source 'text'; available: none"):
        tokenizer.encode_table(table.drop_columns("text"))
    with pytest.raises(DataError, match="items: source 'text' is 2 wide, the tokenizer was trained on 6"):
        tokenizer.encode_table(pa.table({"item_id": [1], "text": [[1.0, 2.0]]}))
    with pytest.raises(DataError, match="items: has a column 'sid' already"):
        tokenizer.encode_table(table.append_column("sid", table["sku"]))
    with pytest.raises(DataError, match="items: the frame has no rows"):
        tokenizer.encode_table(table.slice(0, 0))
    with pytest.raises(DataError, match="items: has two columns 'a'"):
        read_frame(pa.table([[1], [2]], names=["a", "a"]), "items")
    with pytest.raises(SidrecError, match="items: must be a frame .*, is list"):
        read_frame([1], "items")


def test_bad_frames_of_pandas():
    pandas = pytest.importorskip("pandas")
    mixed = pandas.DataFrame({"a": [1, 2, "x", 4], "b": 0})
    with pytest.raises(DataError, match="requests: column 'a', row 2: .*give all rows values of one type"):
        read_frame(mixed, "requests")
    assert read_frame(mixed, "requests", ["b", "c"]).schema.names == ["b"]  # what is not read may hold anything
    with pytest.raises(DataError, match="requests: column 0 has no name of letters"):
        read_frame(pandas.DataFrame([[1]]), "requests")


def test_a_query_that_fails_is_named():
    duckdb = pytest.importorskip("duckdb")
    with pytest.raises(DataError, match="requests: cannot be read: Conversion Error: .*'x'"):
        read_frame(duckdb.sql("select cast('x' as int) as a"), "requests")


def test_libraries_are_not_imported_for_it():
    code = "import sys, sidrec_torchrec.data.frames; print({'pandas', 'polars', 'duckdb', 'datasets'} & {*sys.modules})"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "set()"
