"""A split's sequences on disk: part files of row groups, and an index of what every row weighs.

Rows are *dealt*: some millions of events are sorted by length and dealt, as cards are, into ``HANDS`` row groups, so that each
group has as many rows as the others of its deal, and rows of the same lengths. Processes that read different groups
then read as many events, and batches of like length can be made of rows of all of them.

The index says how long each row is and what its labels weigh. It is what every process reads whole; of the rows
themselves each reads its own groups.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Many
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sidrec_torchrec.data.sequences import Sequence, from_table, to_record_batch
from sidrec_torchrec.errors import DataError, first_line
from sidrec_torchrec.files import check_listed
from sidrec_torchrec.part_files import open_parquet, part_path

HANDS = 64  # row groups of a deal: so many processes can read different ones of any 64
_DEAL_EVENTS, _DEAL_ROWS = 1 << 22, 1 << 15  # events and rows of a deal, at most: about 100 MB in memory
# a dictionary of their values would be as long as they are
_DISTINCT = ("user_id", "timestamp", "order", "num_targets")
_OPEN_PARTS = 16
INDEX_FILE = "_index.arrow"  # names that begin so are no data to readers of Parquet folders
_INDEX_SCHEMA = pa.schema(
    [
        ("part", pa.int32()),
        ("group", pa.int32()),
        ("events", pa.list_(pa.int32())),
        ("targets", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.float64())),
    ]
)


@dataclass(frozen=True)
class RowGroup:
    """What is known of a row group of R rows without reading them.

    Args:
        hand: which hand of its deal it was: the higher, the longer are its rows, by a little.
        events_R: int32, events of each row.
        targets_R: int32, its targets that have an item.
        labels_RK: float64, what those of them weigh together that have a label, by task; those of regression come last.
    """

    hand: int
    events_R: np.ndarray
    targets_R: np.ndarray
    labels_RK: np.ndarray


class PartWriter:
    """Writes rows into one part, a deal at a time.

    Args:
        folder: of the split.
        part: number of the part; its file is there if it has rows, and of part 0 always, so that every split has columns.
        schema: see ``sequence_schema``.
        num_tasks: tasks that are no regression.
    """

    def __init__(self, folder: Path, part: int, schema: pa.Schema, num_tasks: int) -> None:
        self._path = part_path(folder, part)
        self._part, self._schema, self._num_tasks = part, schema, num_tasks
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[Sequence] = []
        self._events = 0
        self._index: list[dict[str, object]] = []

    def write(self, row: Sequence) -> None:
        """Appends a row."""
        self._pending.append(row)
        self._events += len(row)
        if self._events >= _DEAL_EVENTS or len(self._pending) >= _DEAL_ROWS:
            self._deal()

    def close(self) -> pa.RecordBatch:
        """Ends the file; gives the part's share of the index."""
        self._deal()
        if self._part == 0:
            self._open()
        if self._writer is not None:
            self._writer.close()
        return pa.RecordBatch.from_pylist(self._index, _INDEX_SCHEMA)

    def _open(self) -> pq.ParquetWriter:
        if self._writer is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            repeating = [f"{name}.list.element" for name in self._schema.names if name not in _DISTINCT]
            self._writer = pq.ParquetWriter(
                self._path, self._schema, compression="zstd", use_dictionary=repeating, write_page_checksum=True
            )
        return self._writer

    def _deal(self) -> None:
        if not self._pending:
            return
        writer, rows = self._open(), sorted(self._pending, key=len)
        for hand in range(min(HANDS, len(rows))):
            group = rows[hand::HANDS]
            writer.write_batch(to_record_batch(group, self._schema), row_group_size=len(group))
            self._index.append(
                {
                    "part": self._part,
                    "group": len(self._index),
                    "events": [len(row) for row in group],
                    "targets": [row.num_scored() for row in group],
                    "labels": np.concatenate([row.label_weights(self._num_tasks) for row in group]),
                }
            )
        self._pending, self._events = [], 0


def write_index(path: Path, parts: Iterable[pa.RecordBatch]) -> None:
    """Writes the index of a split, or of some of its parts: a batch for each part that has rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_file(path, _INDEX_SCHEMA) as writer:
        for part in parts:
            if part.num_rows:
                writer.write_batch(part)


def read_index(path: Path) -> list[pa.RecordBatch]:
    """What ``write_index`` wrote, mapped from disk.

    Raises:
        DataError: if it is another version's.
    """
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        if reader.schema != _INDEX_SCHEMA:
            raise DataError(f"{path}: has other columns")
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]


class SequenceFiles:
    """An opened split. Made by ``open_sequences``.

    Args:
        folder: of the split.
        share: number of this process and of all: each part is compared with the list of files by one of them.
    """

    def __init__(self, folder: Path, share: tuple[int, int]) -> None:
        self._folder, self._share = folder, share
        self._parts: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        check_listed(folder / INDEX_FILE)
        self._index = read_index(folder / INDEX_FILE)
        self._ends = list(accumulate(batch.num_rows for batch in self._index))

    @property
    def num_groups(self) -> int:
        return self._ends[-1] if self._ends else 0

    def look(self, group: int) -> RowGroup:
        """What the index says of a row group."""
        batch, i = self._place(group)
        events_R, targets_R, labels = (batch[name][i].values.to_numpy() for name in ("events", "targets", "labels"))
        hand = batch["group"][i].as_py() % HANDS  # only the last deal of a part has fewer
        return RowGroup(hand, events_R, targets_R, labels.reshape(len(events_R), -1))

    def rows(self, group: int) -> list[Sequence]:
        """The rows of a group, in order of their lengths."""
        return from_table(self.table(group))

    def table(self, group: int, columns: Many[str] | None = None) -> pa.Table:
        """The rows of a group as Arrow has them; some columns of them, or all."""
        batch, i = self._place(group)
        part, own = batch["part"][i].as_py(), batch["group"][i].as_py()
        table = self._file(part).read_row_group(own, columns=None if columns is None else list(columns))
        if table.num_rows != len(batch["events"][i]):
            raise DataError(f"{part_path(self._folder, part)}: not the part that the index is of")
        return table

    def close(self) -> None:
        """Closes all parts."""
        while self._parts:
            self._parts.popitem()[1].close()

    def _place(self, group: int) -> tuple[pa.RecordBatch, int]:
        part = int(np.searchsorted(self._ends, group, side="right"))
        return self._index[part], group - (self._ends[part - 1] if part else 0)

    def _file(self, part: int) -> pq.ParquetFile:
        if part not in self._parts:
            path = part_path(self._folder, part)
            rank, world_size = self._share
            check_listed(path, content=part % world_size == rank)
            self._parts[part] = open_parquet(path)
            if len(self._parts) > _OPEN_PARTS:
                self._parts.popitem(last=False)[1].close()
        self._parts.move_to_end(part)
        return self._parts[part]


@contextmanager
def open_sequences(folder: Path, share: tuple[int, int] = (0, 1)) -> Iterator[SequenceFiles]:
    """A split of prepared sequences.

    Args:
        folder: of the split.
        share: number of this process, and of all that read it.

    Raises:
        DataError: if it is missing, broken or cut short; also where that comes out while it is read.
    """
    files: SequenceFiles | None = None
    try:
        files = SequenceFiles(folder, share)
        yield files
    except (pa.ArrowException, OSError, DataError) as error:
        raise DataError(f"{folder}: not whole sequences, or cut short: {first_line(error)}; prepare again") from error
    finally:
        if files is not None:
            with suppress(OSError):
                files.close()
